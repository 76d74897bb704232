"""Layers whose memory is solved or kept at several scales, as float64 NumPy loops.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _Conv, _f64, _resets, _sigmoid, _softplus, short_conv


def mesanet(layer, params, x, reset=None):
    """o = S^T (G + diag lambda)^-1 q, decayed sums G of b k k^T, S of b k v^T (2506.05233)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    conv, heads = _Conv(layer.conv_size, bias=False), layer.heads
    q, k = (short_conv(conv, p[f"{n}_conv"], x @ p[f"{n}_proj"], reset) for n in "qk")
    q, k, v = (y.reshape(*x.shape[:2], heads, -1) for y in (q, k, x @ p["v_proj"]))
    q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    beta, decay = (_sigmoid(x @ p[f"{n}_proj"] + p[f"{n}_bias"]) for n in ("beta", "a"))
    ridge = _softplus(p["ridge"]) + 0.25
    size = q.shape[-1]
    y = np.zeros_like(x)
    for b in range(len(x)):
        G = S = np.zeros((heads, size, size))
        for t in range(x.shape[1]):
            if reset[b, t]:
                G = S = np.zeros((heads, size, size))
            key = (beta[b, t][:, None] * k[b, t])[..., None]
            kept = decay[b, t][:, None, None]
            G = kept * G + key * k[b, t][:, None, :]
            S = kept * S + key * v[b, t][:, None, :]
            out = []
            for h in range(heads):
                o = S[h].T @ np.linalg.solve(G[h] + np.diag(ridge[h]), q[b, t, h])
                out.append(o / np.sqrt(np.mean(o * o) + layer.norm_eps) * p["norm"])
            y[b, t] = np.concatenate(out) @ p["out_proj"]
    return y


def loglinear(layer, params, x, reset=None):
    """o_t = sum_j lambda_t^level(t, j) q_t^T A_t .. A_{j+1} w_j v_j^T (arXiv 2506.04761)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    return np.stack([_loglinear(layer, p, x[b], reset[b]) for b in range(len(x))])


def _loglinear(layer, p, x, reset):
    conv, heads, length = _Conv(layer.conv_size, bias=False), layer.heads, len(x)
    q, k, v = (
        short_conv(conv, p[f"{n}_conv"], (x @ p[f"{n}_proj"])[None], reset[None])[0] for n in "qkv"
    )
    q, k, v = (y.reshape(length, heads, -1) for y in (q, k, v))
    rate = dt = _softplus(x @ p["dt_proj"] + p["dt_bias"])
    alpha = np.exp(-np.exp(p["A_log"]) * dt)
    size = q.shape[-1]
    transition = alpha[..., None, None] * np.eye(size)
    if layer.rule == "delta":
        q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
        rate = _sigmoid(x @ p["beta_proj"])
        erased = rate[..., None, None] * k[..., :, None] * k[..., None, :]
        transition = alpha[..., None, None] * (np.eye(size) - erased)
    scales = (x @ p["level_proj"]).reshape(length, heads, -1) * p["level_scale"]
    weight = _softplus(scales)
    y = np.zeros_like(x)
    written = np.zeros((0, heads, size, v.shape[-1]))  # what each step since the reset left
    for t in range(length):
        if reset[t]:
            written = written[:0]
        written = transition[t] @ written
        now = (rate[t][:, None] * k[t])[..., None] * v[t][:, None, :]
        written = np.concatenate([written, now[None]])
        here = len(written) - 1
        o = np.zeros(v.shape[1:])
        for j in range(len(written)):
            level = (here ^ j).bit_length()
            if level < layer.levels:
                read = np.einsum("hkv,hk->hv", written[j], q[t]) / np.sqrt(size)
                o += weight[t, :, level][:, None] * read
        o = o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + layer.norm_eps) * p["norm"]
        gate = x[t] @ p["gate_proj"]
        y[t] = (o.reshape(-1) * gate * _sigmoid(gate)) @ p["out_proj"]
    return y
