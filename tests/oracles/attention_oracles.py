"""Layers with a matrix state as float64 NumPy loops, written from the papers' equations.

The functions have the form of those in `layer_oracles`, and nothing here comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _Conv, _f64, _resets, _silu, _softplus, short_conv


def _rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _memory_loop(x, reset, heads, keys, values, update):
    """Run (memory [heads, keys, values], b, t) -> (memory, y_t) over all rows and positions."""
    y = [[None] * x.shape[1] for _ in range(x.shape[0])]
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if t == 0 or reset[b, t]:
                memory = np.zeros((heads, keys, values))
            memory, y[b][t] = update(memory, b, t)
    return np.array(y)


def mamba2(layer, params, x, reset=None):
    """S = exp(-exp(A_log) dt) S + B (dt u)^T; y = S^T C + D u (arXiv 2405.21060)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size, states = layer.head_count, layer.head_dim, layer.state_dim
    conv = _Conv(layer.conv_size, layer.conv_bias)

    def project(name, bias):
        return x @ p[f"{name}_proj"] + (p[bias] if layer.in_bias else 0)

    u, B, C = (
        short_conv(conv, p[f"{name}_conv"], project(source, f"{source}_bias"), reset)
        for name, source in (("u", "in"), ("B", "B"), ("C", "C"))
    )
    z = project("gate", "gate_bias")
    dt = _softplus(project("dt", "dt_proj_bias") + p["dt_bias"])
    dt = np.minimum(np.maximum(dt, layer.dt_limit[0]), layer.dt_limit[1])

    def update(memory, b, t):
        out = np.zeros((heads, size))
        u_t = u[b, t].reshape(heads, size)
        for h in range(heads):
            group = h // (heads // layer.groups)
            B_t, C_t = (w[b, t].reshape(layer.groups, states)[group] for w in (B, C))
            decay = np.exp(-np.exp(p["A_log"][h]) * dt[b, t, h])
            memory[h] = decay * memory[h] + np.outer(B_t, dt[b, t, h] * u_t[h])
            out[h] = memory[h].T @ C_t + p["D"][h] * u_t[h]
        y, gate = out.reshape(-1), _silu(z[b, t])
        if layer.norm == "gate_first":
            y = y * gate
        if layer.norm is not None:
            y = _rms(y.reshape(layer.groups, -1), layer.norm_eps).reshape(-1) * p["norm"]
        if layer.norm != "gate_first":
            y = y * gate
        return memory, y @ p["out_proj"] + (p["out_bias"] if layer.out_bias else 0)

    return _memory_loop(x, reset, heads, states, size, update)
