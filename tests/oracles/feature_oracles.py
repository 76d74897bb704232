"""Linear attention with feature maps and gates, as float64 NumPy loops from the papers' equations.

The functions have the form of those in `layer_oracles`, and nothing here comes from seqjax.
"""

import numpy as np

from tests.oracles.attention_oracles import _memory_loop, _rms
from tests.oracles.layer_oracles import _f64, _resets, _sigmoid, _silu


def hgrn2(layer, params, x, reset=None, bound=0.0):
    """S = diag(f) S + (1 - f) v^T, f = bound + (1 - bound) sigmoid(x W_f) (arXiv 2404.07904)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.key_dim
    q, v = _silu(x @ p["q_proj"]), x @ p["input_proj"]
    f = bound + (1 - bound) * _sigmoid(x @ p["forget_proj"])

    def update(memory, b, t):
        out = np.zeros((heads, size))
        for h in range(heads):
            q_h, f_h, v_h = (z[b, t].reshape(heads, size)[h] for z in (q, f, v))
            memory[h] = f_h[:, None] * memory[h] + np.outer(1 - f_h, v_h)
            out[h] = memory[h].T @ q_h / np.sqrt(size)
        return memory, (_rms(out.reshape(-1), layer.norm_eps) * p["norm"]) @ p["out_proj"]

    return _memory_loop(x, reset, heads, size, size, update)


def _attention_of_kernel(layer, p, x, reset, kernel, normalize):
    """Return normalize(sum_j kernel(q_t, k_j) v_j, sum_j kernel(q_t, k_j)) W_o, summed directly.

    `kernel` takes a query and a key of one head.
    """
    heads = layer.heads
    q, k, v = ((x @ p[f"{name}_proj"]).reshape(*x.shape[:2], heads, -1) for name in ("q", "k", "v"))
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        start = 0
        for t in range(x.shape[1]):
            if reset[b, t]:
                start = t
            out = np.zeros(v.shape[2:])
            for h in range(heads):
                scores = np.array([kernel(q[b, t, h], k[b, j, h]) for j in range(start, t + 1)])
                out[h] = normalize(scores @ v[b, start : t + 1, h], scores.sum())
            if getattr(layer, "normalizer", "sum") == "rms":
                out = _rms(out.reshape(-1), layer.eps) * p["norm"]
            y[b, t] = out.reshape(-1) @ p["out_proj"]
    return y


def linear_attention(layer, params, x, reset=None):
    """o_t = sum_j phi(q_t) . phi(k_j) v_j over the sum of the scores, or in a norm (2006.16236)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)

    def features(z):
        size = len(z)
        match layer.feature_map:
            case "elu":
                return np.where(z > 0, z + 1, np.exp(z))
            case "relu":
                return np.maximum(z, 0)
            case "softmax":
                return np.exp(z) / np.exp(z).sum()
            case "performer":
                z, w = z * size**-0.25, layer.directions
                return np.exp(z @ w - z @ z / 2) / np.sqrt(w.shape[1])
            case "dpfp":
                r = np.maximum(np.concatenate([z, -z]), 0)
                orders = range(1, layer.map_order + 1)
                return np.concatenate([[r[i] * r[i - j] for i in range(len(r))] for j in orders])
        return z

    def normalize(o, total):
        return o / (total + layer.eps) if layer.normalizer == "sum" else o

    def kernel(q, k):
        return features(q) @ features(k)

    return _attention_of_kernel(layer, p, x, reset, kernel, normalize)


def based(layer, params, x, reset=None):
    """o_t = sum_j K(q_t, k_j) v_j over the sum of K, K = 1 + s + s^2/2 or s^2 (2402.18668)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)

    def normed(z, name):
        z = (z - z.mean()) / np.sqrt(z.var() + layer.norm_eps)
        return z * p[f"{name}_scale"] + p[f"{name}_bias"]

    def kernel(q, k):
        if layer.rebased:
            return (normed(q, "q") @ normed(k, "k")) ** 2 / len(q)
        s = q @ k / np.sqrt(len(q))
        return 1 + s + s**2 / 2

    def normalize(o, total):
        return o / (total + (layer.eps or 1e-12))

    return _attention_of_kernel(layer, p, x, reset, kernel, normalize)


def plstm(layer, params, x, reset=None):
    """S = a S + s k v^T, read before the write by m, and the present by d (arXiv 2506.11997)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.key_dim
    q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")
    source, mark, direct, transition = (
        x @ p[f"{name}_proj"] + p[f"{name}_bias"]
        for name in ("source", "mark", "direct", "transition")
    )

    def update(memory, b, t):
        out = np.zeros((heads, size))
        for h in range(heads):
            q_h, k_h, v_h = (z[b, t].reshape(heads, size)[h] for z in (q, k, v))
            past = _sigmoid(mark[b, t, h]) * (memory[h].T @ q_h)
            o = (past + _sigmoid(direct[b, t, h]) * (q_h @ k_h) * v_h) / np.sqrt(size)
            written = _sigmoid(source[b, t, h]) * np.outer(k_h, v_h)
            memory[h] = np.tanh(5 * transition[b, t, h]) * memory[h] + written
            out[h] = _rms(o, layer.norm_eps) * p["norm"]
        return memory, out.reshape(-1) @ p["out_proj"]

    return _memory_loop(x, reset, heads, size, size, update)
