"""Gated elementwise recurrences as float64 NumPy loops, written from the papers' equations.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _f64, _resets, _sigmoid


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
