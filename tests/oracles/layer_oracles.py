"""Layers as float64 NumPy loops over single positions, written from the papers' equations.

Each function takes `(layer, params, x, reset=None)`, with `x` [B, T, dim] and `reset` [B, T] bool,
and returns y [B, T, dim]. `layer` is read for its hyperparameters and `params` by name only:
nothing here comes from seqjax.
"""

import math

import numpy as np


def _f64(tree):
    if isinstance(tree, dict):
        return {name: _f64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def _resets(x, reset):
    return np.zeros(x.shape[:2], bool) if reset is None else np.asarray(reset, bool)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _silu(x):
    return x * _sigmoid(x)


def _softplus(x):
    return np.logaddexp(0, x)


def _complex(pair):
    return pair[0] + 1j * pair[1]


def lru(layer, params, x, reset=None):
    """h = lambda h + gamma B x; y = Re(C h) + D x (arXiv 2303.06349)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    modulus = np.exp(-np.exp(p["nu_log"]))
    if layer.reparameterization == "best":
        modulus = 1 - 1 / (p["nu_log"] ** 2 + 0.5)
    lam = modulus * np.exp(1j * np.exp(p["theta_log"]))
    gamma = np.exp(p["gamma_log"])
    B, C = _complex(p["B"]), _complex(p["C"])
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros(lam.shape, complex)
        for t in range(x.shape[1]):
            if reset[b, t]:
                h = np.zeros(lam.shape, complex)
            h = lam * h + gamma * (x[b, t] @ B)
            y[b, t] = (h @ C).real + p["D"] * x[b, t]
    return y


def stable_rate(layer, w):
    """Return the rate that `layer.reparameterization` makes of a weight (arXiv 2311.14495)."""
    if layer.reparameterization == "best":
        return 1 / (w**2 + 0.1)
    return np.exp(w) if layer.reparameterization == "exp" else np.log1p(np.exp(w))


def s5(layer, params, x, reset=None):
    """Zero-order hold of h' = Lambda h + B x; y = 2 Re(C h) + D x (arXiv 2208.04933)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    lam = -stable_rate(layer, p["log_A_real"]) + 1j * p["A_imag"]
    a_bar = np.exp(lam * np.exp(p["log_step"]))
    b_bar = _complex(p["B"]) * ((a_bar - 1) / lam)
    states = lam.shape[0]
    C = _complex(p["C"])
    y = p["D"] * x
    batch, length, _ = x.shape
    for b in range(batch):
        h = np.zeros(states, complex)
        for t in range(length):
            if reset[b, t]:
                h = np.zeros(states, complex)
            h = a_bar * h + x[b, t] @ b_bar
            y[b, t] += 2 * (h @ C[:states]).real
        if not layer.bidirectional:
            continue
        h = np.zeros(states, complex)
        for t in reversed(range(length)):
            if t + 1 < length and reset[b, t + 1]:
                h = np.zeros(states, complex)
            h = a_bar * h + x[b, t] @ b_bar
            y[b, t] += 2 * (h @ C[states:]).real
    return y


def gateloop(layer, params, x, reset=None):
    """S = diag(a) S + k v^T with a = sigmoid(m) exp(i phase) from x (arXiv 2311.01927)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.key_dim
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        memory = np.zeros((heads, size, size), complex)
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((heads, size, size), complex)
            x_t = x[b, t]
            q, k, v = (
                (x_t @ p[name]).reshape(heads, size) for name in ("q_proj", "k_proj", "v_proj")
            )
            magnitude = _sigmoid(x_t @ p["magnitude_proj"] + p["magnitude_bias"])
            phase = x_t @ p["phase_proj"] + p["phase_bias"]
            a = (magnitude * np.exp(1j * phase)).reshape(heads, size)
            out = np.zeros((heads, size))
            for h in range(heads):
                memory[h] = a[h][:, None] * memory[h] + np.outer(k[h], v[h])
                out[h] = (q[h] @ memory[h]).real / np.sqrt(size)
            y[b, t] = (_silu(x_t @ p["gate_proj"]) * out.reshape(-1)) @ p["out_proj"]
    return y


def short_conv(layer, params, x, reset=None):
    """y_t = sum_j w_j x_{t-j}, no further back than the last reset."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        start = 0
        for t in range(x.shape[1]):
            if reset[b, t]:
                start = t
            for j in range(layer.size):
                if t - j >= start:
                    y[b, t] += p["weight"][j] * x[b, t - j]
    if layer.bias:
        y = y + p["bias"]
    return _silu(y) if layer.activation == "silu" else y


def gated_conv(layer, params, x, reset=None):
    """(x W_C * conv(x W_B * x W_in)) W_out (arXiv 2511.23404)."""
    p, x = _f64(params), _f64(x)
    B, C, u = (x @ p[f"{name}_proj"] + p.get(f"{name}_bias", 0) for name in ("B", "C", "in"))
    inner = _Conv(layer.size, layer.bias)
    inner.activation = None
    return (C * short_conv(inner, p["conv"], B * u, reset)) @ p["out_proj"] + p.get("out_bias", 0)


class _Conv:
    """The hyperparameters of a short convolution inside another layer."""

    def __init__(self, size, bias):
        self.size, self.bias, self.activation = size, bias, "silu"


def mamba(layer, params, x, reset=None):
    """h = exp(dt A) h + dt B u; y = C h + D u, all of it chosen by the input (arXiv 2312.00752)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    u = x @ p["in_proj"] + p.get("in_bias", 0)
    u = short_conv(_Conv(layer.conv_size, layer.conv_bias), p["conv"], u, reset)
    A = -np.exp(p["A_log"])
    rank, states, groups = layer.rank, layer.state_dim, layer.groups or 1
    x_proj, dt_proj = (p[n].reshape(groups, *p[n].shape[-2:]) for n in ("x_proj", "dt_proj"))
    channels = u.shape[-1] // groups
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros(A.shape)
        for t in range(x.shape[1]):
            if reset[b, t]:
                h = np.zeros(A.shape)
            read = np.zeros(len(A))
            for g in range(groups):
                own = slice(g * channels, (g + 1) * channels)
                u_t = u[b, t, own]
                projected = u_t @ x_proj[g]
                parts = np.split(projected, [rank, rank + states])
                if layer.inner_norm_eps is not None:
                    parts = [z / np.sqrt((z**2).mean() + layer.inner_norm_eps) for z in parts]
                if layer.inner_norm_scales:
                    parts = [
                        z * p[f"{n}_norm"] for n, z in zip(("dt", "B", "C"), parts, strict=True)
                    ]
                r, B, C = parts
                dt = _softplus(r @ dt_proj[g] + p["dt_bias"][own])
                decay = np.exp(dt[:, None] * A[own])
                if layer.negative_eigenvalues:
                    decay = 2 * decay - 1
                h[own] = decay * h[own] + np.outer(dt * u_t, B)
                read[own] = h[own] @ C + p["D"][own] * u_t
            gate = _silu(x[b, t] @ p["gate_proj"] + p.get("gate_bias", 0))
            y[b, t] = (read * gate) @ p["out_proj"] + p.get("out_bias", 0)
    return y


def gsa(layer, params, x, reset=None):
    """P = P diag(a) + k s^T, S = diag(a) S + s v^T, o = S^T softmax(P^T q) (arXiv 2409.07146)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size, slots = layer.heads, layer.key_dim, layer.slot_count
    q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")
    if layer.conv_size is None:
        q, k, v = _silu(q), _silu(k), _silu(v)
    else:
        conv = _Conv(layer.conv_size, bias=False)
        q, k, v = (
            short_conv(conv, p[f"{name}_conv"], z, reset)
            for name, z in zip("qkv", (q, k, v), strict=True)
        )
    decay = _sigmoid(x @ p["f_proj"]) ** (1 / layer.gate_temperature)
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if t == 0 or reset[b, t]:
                P, S = np.zeros((heads, size, slots)), np.zeros((heads, slots, size))
            out = np.zeros((heads, size))
            for h in range(heads):
                own, a = slice(h * size, (h + 1) * size), decay[b, t, h * slots : (h + 1) * slots]
                P[h] = P[h] * a + np.outer(k[b, t, own], 1 - a)
                S[h] = S[h] * a[:, None] + np.outer(1 - a, v[b, t, own])
                u = np.exp(P[h].T @ q[b, t, own])
                out[h] = _silu(S[h].T @ (u / np.sum(u)))
            out = out.reshape(-1)
            norm = np.sqrt(np.mean(out * out) + layer.norm_eps)
            y[b, t] = (out / norm * p["norm"]) @ p["out_proj"]
    return y


def gla(layer, params, x, reset=None):
    """S = diag(exp g) S + k v^T with g = log sigmoid(x W_1 W_2 + b) / tau (arXiv 2312.06635)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads = layer.heads
    q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")
    if layer.conv_size is not None:
        conv = _Conv(layer.conv_size, bias=False)
        q, k, v = (
            short_conv(conv, p[f"{name}_conv"], z, reset)
            for name, z in zip("qkv", (q, k, v), strict=True)
        )
    size, values = q.shape[-1] // heads, v.shape[-1] // heads
    gate = x @ p["decay_down"] @ p["decay_up"] + p["decay_bias"]
    decay = _sigmoid(gate) ** (1 / layer.gate_temperature)
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        memory = np.zeros((heads, size, values))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((heads, size, values))
            out = np.zeros((heads, values))
            for h in range(heads):
                keys, vals = slice(h * size, (h + 1) * size), slice(h * values, (h + 1) * values)
                kept = decay[b, t, keys][:, None] * memory[h]
                memory[h] = kept + np.outer(k[b, t, keys], v[b, t, vals])
                o = memory[h].T @ q[b, t, keys] / np.sqrt(size)
                out[h] = o / np.sqrt(np.mean(o * o) + layer.norm_eps) * p["norm"]
            y[b, t] = (out.reshape(-1) * _silu(x[b, t] @ p["gate_proj"])) @ p["out_proj"]
    return y


def layer_norm(layer, params, x, reset=None):
    """(x - mean) / sqrt(var + eps) * scale + bias (arXiv 1607.06450)."""
    del reset
    p, x = _f64(params), _f64(x)
    centered = x - x.mean(-1, keepdims=True)
    y = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + layer.eps) * p["scale"]
    return y + p["bias"] if layer.bias else y


def attention(layer, params, x, reset=None):
    """Softmax over earlier positions, rotary by absolute position (1706.03762, 2104.09864)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.key_dim
    keys = getattr(layer, "kv_heads", None) or heads
    window = layer.window or x.shape[1]
    turned_size = getattr(layer, "rotary_dim", None)
    turned_size = size if turned_size is None else turned_size
    half = turned_size // 2
    frequency = layer.rope_base ** (-2.0 * np.arange(half) / max(turned_size, 1))
    scale = getattr(layer, "scale", None) or size**-0.5
    norm = getattr(layer, "qk_norm", None)

    def rotate(z, t):
        turned = (z[..., :half] + 1j * z[..., half:turned_size]) * np.exp(1j * t * frequency)
        return np.concatenate([turned.real, turned.imag, z[..., turned_size:]], axis=-1)

    def project(x_b, name, count):
        z = (x_b @ p[f"{name}_proj"] + p.get(f"{name}_bias", 0)).reshape(len(x_b), count, size)
        if name == "v":
            return z
        if norm is not None:
            scale = p[f"{name}_norm"] + (1 if norm == "rms_offset" else 0)
            if norm == "rms_all_heads":
                z = z.reshape(len(x_b), 1, count * size)
            z = z / np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + layer.norm_eps) * scale
        z = z.reshape(len(x_b), count, size)
        return np.stack([rotate(z_t, t) for t, z_t in enumerate(z)])

    y = np.zeros((*x.shape[:2], p["out_proj"].shape[1]))
    for b in range(x.shape[0]):
        start = 0
        q, k, v = project(x[b], "q", heads), project(x[b], "k", keys), project(x[b], "v", keys)
        for t in range(x.shape[1]):
            if reset[b, t]:
                start = t
            seen = slice(max(start, t - window + 1), t + 1)
            o = np.zeros((heads, size))
            for h in range(heads):
                own = h // (heads // keys)
                scores = scale * (k[seen, own] @ q[t, h])
                weights = np.exp(scores - scores.max())
                o[h] = (weights / weights.sum()) @ v[seen, own]
            o = o.reshape(-1)
            if "gate_proj" in p:
                o = o * _sigmoid(x[b, t] @ p["gate_proj"])
            y[b, t] = o @ p["out_proj"] + p.get("out_bias", 0)
    return y


def rms_norm(layer, params, x, reset=None):
    """x / rms(x) * scale, or * (1 + scale)."""
    del reset
    p, x = _f64(params), _f64(x)
    scale = 1 + p["scale"] if layer.offset else p["scale"]
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + layer.eps) * scale


def _activation(name, x):
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return _silu(x)


def gated_mlp(layer, params, x, reset=None):
    """(activation(x W_gate) * (x W_up)) W_down, with biases."""
    del reset
    p, x = _f64(params), _f64(x)
    gate = _activation(layer.activation, x @ p["gate_proj"] + p.get("gate_bias", 0))
    up = x @ p["up_proj"] + p.get("up_bias", 0)
    return (gate * up) @ p["down_proj"] + p.get("down_bias", 0)


def mlp(layer, params, x, reset=None):
    """activation(x W_up) W_down, with biases."""
    del reset
    p, x = _f64(params), _f64(x)
    hidden = _activation(layer.activation, x @ p["up_proj"] + p.get("up_bias", 0))
    return hidden @ p["down_proj"] + p.get("down_bias", 0)


def scaled(oracle):
    """Return the oracle of a layer with factors on its input, output and parameters."""

    def run(layer, params, x, reset=None):
        params = {name: p * dict(layer.param_scales).get(name, 1) for name, p in params.items()}
        y = oracle(layer.layer, params, np.asarray(x) * layer.input_scale, reset)
        return y * layer.output_scale

    return run
