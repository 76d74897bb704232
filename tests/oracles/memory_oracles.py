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
