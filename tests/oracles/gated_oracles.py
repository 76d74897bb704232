"""Gated elementwise recurrences as float64 NumPy loops, written from the papers' equations.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _f64, _resets, _sigmoid, _silu


def token_shift(layer, params, x, reset=None):
    """mix x_t + (1 - mix) x_{t-1}, with zero before the start and at resets (arXiv 2305.13048)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        previous = np.zeros(layer.dim) if t == 0 or reset[b, t] else x[b, t - 1]
        y[b, t] = p["mix"] * x[b, t] + (1 - p["mix"]) * previous
    return y


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rglru(layer, params, x, reset=None):
    """h = a h + sqrt(1 - a^2) i u with a = sigmoid(-Lambda)^(8 r) (arXiv 2402.19427)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    size = layer.states // layer.heads
    u = _conv(p["conv"]["weight"], x @ p["in_proj"] + p["in_bias"], reset) + p["conv"]["bias"]

    def gate(name, u_t):
        blocks = [u_t[g * size : (g + 1) * size] @ p[name][g] for g in range(layer.heads)]
        return _sigmoid(np.concatenate(blocks) + p[f"{name}_bias"])

    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            first = t == 0 or reset[b, t]
            if first:
                h = np.zeros(layer.states)
            a = _sigmoid(-p["Lambda"]) ** (8 * gate("recurrence_gate", u[b, t]))
            weight = 1 if first and layer.unit_first_step else np.sqrt(1 - a**2)
            h = a * h + weight * gate("input_gate", u[b, t]) * u[b, t]
            out = _gelu(x[b, t] @ p["gate_proj"] + p["gate_bias"]) * h
            y[b, t] = out @ p["out_proj"] + p["out_bias"]
    return y


def _conv(taps, x, reset):
    """Return sum_j taps_j x_{t-j}, no further back than the last reset."""
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        start = 0
        for t in range(x.shape[1]):
            start = t if reset[b, t] else start
            for j in range(min(len(taps), t - start + 1)):
                y[b, t] += taps[j] * x[b, t - j]
    return y


def _scan(decay, u, reset):
    """Return h_t = decay_t h_{t-1} + u_t for [B, T, ...] arrays."""
    h = np.zeros_like(u)
    for b, t in np.ndindex(u.shape[:2]):
        before = 0 if t == 0 or reset[b, t] else h[b, t - 1]
        h[b, t] = decay[b, t] * before + u[b, t]
    return h


def _out(p, h):
    return h @ p["out_proj"] if "out_proj" in p else h


def _positive(layer, u):
    return np.where(u >= 0, u + 0.5, _sigmoid(u)) if layer.positive else u


def mingru(layer, params, x, reset=None):
    """h = (1 - z) h + z g(x W_h) (arXiv 2410.01201)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    z = _sigmoid(x @ p["gate_proj"])
    return _out(p, _scan(1 - z, z * _positive(layer, x @ p["hidden_proj"]), reset))


def minlstm(layer, params, x, reset=None):
    """h = f / (f + i) h + i / (f + i) g(x W_h) (arXiv 2410.01201)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    f, i = _sigmoid(x @ p["forget_proj"]), _sigmoid(x @ p["input_proj"])
    candidate = _positive(layer, x @ p["hidden_proj"])
    return _out(p, _scan(f / (f + i), i / (f + i) * candidate, reset))


def hgrn(layer, params, x, reset=None, bound=0.0):
    """h = f h + (1 - f) silu(x W_i) with f in [bound, 1] (arXiv 2311.04823)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    f = bound + (1 - bound) * _sigmoid(x @ p["forget_proj"])
    h = _scan(f, (1 - f) * _silu(x @ p["input_proj"]), reset)
    h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + layer.norm_eps) * p["norm"]
    return (h * _silu(x @ p["gate_proj"])) @ p["out_proj"]


def qrnn(layer, params, x, reset=None):
    """c = f c + (1 - f) z; h = o c, gates from two inputs (arXiv 1611.01576)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    previous = np.zeros_like(x)
    previous[:, 1:] = x[:, :-1]
    previous[reset] = 0
    u = np.concatenate([x, previous], axis=-1) @ np.concatenate([p["in_proj"], p["previous_proj"]])
    z, f, o = np.split(u + p["bias"], 3, axis=-1)
    f = _sigmoid(f)
    return _out(p, _sigmoid(o) * _scan(f, (1 - f) * np.tanh(z), reset))


def quasi_lstm(layer, params, x, reset=None):
    """c = f c + i z; h = o tanh(c) (arXiv 2309.11197)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    f, i, z, o = np.split(x @ p["in_proj"] + p["bias"], 4, axis=-1)
    c = _scan(_sigmoid(f), _sigmoid(i) * np.tanh(z), reset)
    return (_sigmoid(o) * np.tanh(c)) @ p["out_proj"] + p["out_bias"]


def ffm(layer, params, x, reset=None):
    """S = exp(-a + i omega) S + p for every decay and frequency (arXiv 2310.04128)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)

    def linear(name):
        return x @ p[f"{name}_proj"] + p[f"{name}_bias"]

    decay = np.exp(-np.exp(p["log_decay"])[:, None] + 1j * p["omega"][None, :])
    u = linear("memory") * _sigmoid(linear("input_gate"))
    shape = (*x.shape[:2], layer.memory_dim, layer.contexts)
    memory = _scan(
        np.broadcast_to(decay, shape), np.broadcast_to(u[..., None], shape).astype(complex), reset
    ).reshape(*x.shape[:2], -1)
    z = (memory @ (p["mix_proj"][0] + 1j * p["mix_proj"][1])).real + p["mix_bias"]
    z = z - z.mean(-1, keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + layer.norm_eps)
    g = _sigmoid(linear("gate"))
    return g * z + (1 - g) * linear("skip")


def sru(layer, params, x, reset=None):
    """c = f c + (1 - f) x W; h = r c + (1 - r) s x, gates that see c (arXiv 1709.02755)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    scale = np.sqrt(1 + 2 * np.exp(layer.highway_bias))
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if t == 0 or reset[b, t]:
                c = np.zeros(layer.states)
            x_t = x[b, t]
            f = _sigmoid(x_t @ p["forget_proj"] + p["v_f"] * c + p["forget_bias"])
            r = _sigmoid(x_t @ p["reset_proj"] + p["v_r"] * c + p["reset_bias"])
            c = f * c + (1 - f) * (x_t @ p["in_proj"])
            skip = x_t @ p["skip_proj"] if "skip_proj" in p else scale * x_t
            y[b, t] = _out(p, r * c + (1 - r) * skip)
    return y
