"""Layers with exponential gates as float64 NumPy loops, from plain exponentials and sums.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax. There is no stabilizer: the layers' algebra is not repeated.
"""

import numpy as np

from tests.oracles.layer_oracles import _Conv, _f64, _resets, _sigmoid, _silu, short_conv


def _by_blocks(x, weight):
    size = weight.shape[1]
    parts = [x[..., i * size : (i + 1) * size] @ block for i, block in enumerate(weight)]
    return np.concatenate(parts, axis=-1)


def _head_norm(h, eps):
    """Return h [H, V] with mean 0 and variance 1 in each head."""
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + eps)


def mlstm(layer, params, x, reset=None):
    """C = f C + i k v^T, n = f n + i k, h = C^T q / (max(|n q|, 1) + eps e^m) (2405.04517)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    return np.stack([_mlstm(layer, p, x[b], reset[b]) for b in range(len(x))])


def _mlstm(layer, p, x, reset):
    xlstm = layer.variant == "xlstm"
    if xlstm:
        a, z = np.split(x @ p["up_proj"], 2, axis=-1)
        c = short_conv(_Conv(layer.conv_size, bias=True), p["conv"], a[None], reset[None])[0]
        q, k = _by_blocks(c, p["q_proj"]), _by_blocks(c, p["k_proj"])
        v = _by_blocks(a, p["v_proj"])
        gated = np.concatenate([q, k, v], axis=-1)
    else:
        q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")
        gated = x
    gates = {g: gated @ p[f"{g}gate_proj"] + p[f"{g}gate_bias"] for g in "if"}
    if not xlstm:
        gates = {g: layer.gate_cap * np.tanh(u / layer.gate_cap) for g, u in gates.items()}
    write = _sigmoid(gates["i"]) if layer.variant == "sig" else np.exp(gates["i"])
    keep = _sigmoid(gates["f"])
    heads = layer.heads
    q, k, v = (y.reshape(len(x), heads, -1) for y in (q, k, v))
    y = np.zeros((len(x), layer.dim))
    C, n = np.zeros((heads, q.shape[-1], v.shape[-1])), np.zeros(q.shape[1:])
    first = np.full(heads, 0.0 if layer.zero_maximum else -np.inf)
    m = first
    for t in range(len(x)):
        if reset[t]:
            C, n, m = np.zeros_like(C), np.zeros_like(n), first
        m = np.maximum(np.log(keep[t]) + m, gates["i"][t])
        h = np.zeros(v.shape[1:])
        for i in range(heads):
            C[i] = keep[t, i] * C[i] + write[t, i] * np.outer(k[t, i], v[t, i])
            n[i] = keep[t, i] * n[i] + write[t, i] * k[t, i]
            query = q[t, i] / np.sqrt(q.shape[-1])
            h[i] = C[i].T @ query
            if layer.variant != "sig" or layer.normalizer:
                h[i] /= max(abs(n[i] @ query), 1) + layer.denominator_eps * np.exp(m[i])
        h = _head_norm(h, layer.norm_eps).reshape(-1)
        if xlstm:
            h = (1 + p["norm"]) * h + p["skip"] * c[t]
            y[t] = (h * _silu(z[t])) @ p["down_proj"]
        else:
            y[t] = (_sigmoid(x[t] @ p["ogate_proj"]) * p["norm"] * h) @ p["out_proj"]
    return y


def aaren(layer, params, x, reset=None):
    """o_t = sum exp(q . k_j K^-0.5) v_j / sum exp(q . k_j K^-0.5) (arXiv 2405.13956)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    batch, length, _ = x.shape
    k, v = ((x @ p[f"{name}_proj"]).reshape(batch, length, layer.heads, -1) for name in "kv")
    scores = np.einsum("bthk,hk->bth", k, p["query"]) / np.sqrt(k.shape[-1])
    y = np.zeros_like(x)
    for b in range(batch):
        start = 0
        for t in range(length):
            start = t if reset[b, t] else start
            weight = np.exp(scores[b, start : t + 1])
            total = np.einsum("th,thv->hv", weight, v[b, start : t + 1])
            y[b, t] = (total / weight.sum(0)[:, None]).reshape(-1) @ p["out_proj"]
    return y


def lightnet(layer, params, x, reset=None):
    """Row c of S is the mean of values with softmax weights over time (arXiv 2405.21022)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    batch, length, _ = x.shape
    q, k, v = (
        y.reshape(batch, length, layer.heads, -1)
        for y in (_silu(x @ p["q_proj"]), x @ p["k_proj"], x @ p["v_proj"])
    )
    y = np.zeros_like(x)
    for b in range(batch):
        sums, total = 0.0, 0.0
        for t in range(length):
            if reset[b, t]:
                sums, total = 0.0, 0.0
            weight = np.exp(k[b, t])
            sums = sums + weight[..., None] * v[b, t][:, None, :]
            total = total + weight
            o = np.einsum("hkv,hk->hv", sums / total[..., None], q[b, t]) / np.sqrt(q.shape[-1])
            o = o.reshape(-1)
            o = o / np.sqrt(np.mean(o * o) + layer.norm_eps) * p["norm"]
            gate = _silu(x[b, t] @ p["gate_down"] @ p["gate_up"])
            y[b, t] = (o * gate) @ p["out_proj"]
    return y


def srwm(layer, params, x, reset=None):
    """W <- W + beta k (q W - k W) with y, q, k, beta = x W (arXiv 2202.05780)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    names = ("y", "q", "k", "beta")
    size = x.shape[-1] // layer.heads
    y = np.zeros_like(x)
    for b in range(len(x)):
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            W = {}
            for t in range(x.shape[1]):
                if t == 0 or reset[b, t]:
                    W = {name: p[f"{name}_proj"][h].copy() for name in names}
                u = _softmax(x[b, t, part]) if layer.input_softmax else x[b, t, part]
                y[b, t, part] = u @ W["y"]
                q, k = _softmax(u @ W["q"]), _softmax(u @ W["k"])
                rates = _sigmoid(u @ W["beta"])
                for name, rate in zip(names, rates, strict=True):
                    W[name] = W[name] + rate * np.outer(k, q @ W[name] - k @ W[name])
    return y @ p["out_proj"]


def recurrent_deltanet(layer, params, x, reset=None):
    """S <- S + beta k (v - k S) with q, k, v, beta of x and of tanh(q S) (arXiv 2106.06295)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    size = len(p["out_proj"]) // layer.heads
    o = np.zeros((*x.shape[:2], len(p["out_proj"])))
    for b in range(len(x)):
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            S, out = np.zeros((size, size)), np.zeros(size)
            for t in range(x.shape[1]):
                if reset[b, t]:
                    S, out = np.zeros((size, size)), np.zeros(size)
                r = np.tanh(out)
                q, k, v = (x[b, t] @ p[f"{n}_proj"][:, part] + r @ p[f"R_{n}"][h] for n in "qkv")
                q, k = _softmax(q), _softmax(k)
                beta = _sigmoid(x[b, t] @ p["beta_proj"][:, h] + r @ p["R_beta"][h, :, 0])
                S = S + beta * np.outer(k, v - k @ S)
                out = q @ S
                o[b, t, part] = out
    return o / np.sqrt(size) @ p["out_proj"]


def delta_rnn(layer, params, x, reset=None):
    """h = q S + softmax(h) R, both matrices written by the delta rule (arXiv 2106.06295)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    size = len(p["out_proj"]) // layer.heads
    y = np.zeros((*x.shape[:2], len(p["out_proj"])))
    for b in range(len(x)):
        for i in range(layer.heads):
            part = slice(i * size, (i + 1) * size)
            S, R, h = np.zeros((size, size)), np.zeros((size, size)), np.zeros(size)
            for t in range(x.shape[1]):
                if reset[b, t]:
                    S, R, h = np.zeros((size, size)), np.zeros((size, size)), np.zeros(size)
                q, k, v = (x[b, t] @ p[f"{n}_proj"][:, part] for n in "qkv")
                q, k = (np.where(z > 0, z + 1, np.exp(z)) for z in (q, k))
                q, k = (z / (z.sum() + 1e-6) for z in (q, k))
                S = S + _sigmoid(x[b, t] @ p["beta_proj"][:, i]) * np.outer(k, v - k @ S)
                k, v = (x[b, t] @ p[f"recurrent_{n}_proj"][:, part] for n in "kv")
                k, beta = _softmax(k), _sigmoid(x[b, t] @ p["recurrent_beta_proj"][:, i])
                R = R + beta * np.outer(k, v - k @ R)
                h = q @ S + _softmax(h) @ R
                y[b, t, part] = h
    return y / np.sqrt(size) @ p["out_proj"]


def _softmax(x):
    weight = np.exp(x)
    return weight / weight.sum()


def rwkv4(layer, params, x, reset=None):
    """wkv = (a + e^(u + k) v) / (b + e^(u + k)), a = e^w a + e^k v (arXiv 2305.13048)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    shares = {c: p[f"x_{c}"] for c in "kvr"}
    if layer.present_share:
        shares = {c: 1 - share for c, share in shares.items()}
    decay = np.exp(-np.exp(p["omega"]))
    y = np.zeros_like(x)
    for b in range(len(x)):
        before, top, bottom = np.zeros(x.shape[-1]), 0.0, 0.0
        for t in range(x.shape[1]):
            if reset[b, t]:
                before, top, bottom = np.zeros(x.shape[-1]), 0.0, 0.0
            k, v, r = (
                (x[b, t] * (1 - shares[c]) + before * shares[c]) @ p[f"{name}_proj"]
                for c, name in (("k", "key"), ("v", "value"), ("r", "receptance"))
            )
            now = np.exp(p["bonus"] + k)
            wkv = (top + now * v) / (bottom + now)
            top, bottom = decay * top + np.exp(k) * v, decay * bottom + np.exp(k)
            y[b, t] = (_sigmoid(r) * wkv) @ p["out_proj"]
            before = x[b, t]
    return y
