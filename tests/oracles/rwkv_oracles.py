"""RWKV and its relatives as float64 NumPy loops, written from the papers' equations.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import (
    _Conv,
    _f64,
    _resets,
    _sigmoid,
    _silu,
    _softplus,
    short_conv,
)


def _shifted(x, reset):
    """Return x_{t-1}, zero at the start and at resets."""
    previous = np.zeros_like(x)
    previous[:, 1:] = x[:, :-1]
    previous[reset] = 0
    return previous


def _mixed(x, reset, share, present=False):
    share = 1 - share if present else share
    return x * (1 - share) + _shifted(x, reset) * share


def _head_norm(o, scale, bias, eps):
    """Return the layer norm of every head of o [H, V], with scale and bias [H * V]."""
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + eps)
    return o.reshape(-1) * scale + bias


def channel_mix(layer, params, x, reset=None):
    """relu(x^k W_k)^2 W_v, and before RWKV-7 times sigmoid(x^r W_r)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    m = {c: _mixed(x, reset, p[f"x_{c}"], layer.present_share) for c in "kr" if f"x_{c}" in p}
    y = np.maximum(m["k"] @ p["key_proj"], 0) ** 2 @ p["value_proj"]
    if layer.version == 7:
        return y
    return _sigmoid(m["r"] @ p["receptance_proj"]) * y


def rwkv7(layer, params, x, reset=None):
    """S = diag(w) S - (c a) (c^T S) + k v^T (arXiv 2503.14456)."""
    return rwkv7_and_values(layer, params, x, reset)[0]


def rwkv7_and_values(layer, params, x, reset=None, first=None):
    """Return the outputs, and the values that later blocks mix in, given those of the first."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.dim // layer.heads
    m = {c: _mixed(x, reset, p[f"x_{c}"]) for c in "rwkvag"}
    r, k, v = (m[c] @ p[f"{c}_proj"] for c in "rkv")
    w = np.exp(-np.exp(-0.5) * _sigmoid(p["w0"] + np.tanh(m["w"] @ p["w1"]) @ p["w2"]))
    a = _sigmoid(p["a0"] + m["a"] @ p["a1"] @ p["a2"])
    g = _sigmoid(m["g"] @ p["g1"]) @ p["g2"]
    if first is None:
        first = v
    else:
        v = v + (first - v) * _sigmoid(p["v0"] + m["v"] @ p["v1"] @ p["v2"])
    c = k * p["k_k"]
    k = k * (1 + (a - 1) * p["k_a"])
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        memory = np.zeros((heads, size, size))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((heads, size, size))
            o, bonus = np.zeros((heads, size)), np.zeros((heads, size))
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                unit = c[b, t, own] / max(np.linalg.norm(c[b, t, own]), 1e-12)
                read = unit @ memory[h]
                memory[h] = w[b, t, own][:, None] * memory[h]
                memory[h] -= np.outer(unit * a[b, t, own], read)
                memory[h] += np.outer(k[b, t, own], v[b, t, own])
                o[h] = memory[h].T @ r[b, t, own]
                bonus[h] = np.sum(r[b, t, own] * k[b, t, own] * p["r_k"][h]) * v[b, t, own]
            o = _head_norm(o, p["norm_scale"], p["norm_bias"], layer.norm_eps * size)
            y[b, t] = ((o + bonus.reshape(-1)) * g[b, t]) @ p["out_proj"]
    return y, first


def rwkv6(layer, params, x, reset=None):
    """o = (S + diag(u) k v^T)^T r, then S = diag(w) S + k v^T (arXiv 2404.05892)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.dim // layer.heads
    names = "wkvrg" if layer.data_dependent else "kvrg"
    shares = {c: p[f"x_{c}"] for c in names}
    w = np.broadcast_to(np.exp(-np.exp(p["w0"])), x.shape)
    if layer.data_dependent:
        low = np.tanh(_mixed(x, reset, p["x_x"]) @ p["mix_down"])
        rank = layer.mix_rank
        for i, c in enumerate(names):
            shares[c] = shares[c] + low[..., i * rank : (i + 1) * rank] @ p["mix_up"][i]
        w = np.tanh(_mixed(x, reset, shares["w"]) @ p["w1"]) @ p["w2"]
        w = np.exp(-np.exp(p["w0"] + w))
    m = {c: _mixed(x, reset, shares[c], layer.present_share) for c in names}
    r, k, v = (m[c] @ p[f"{c}_proj"] for c in "rkv")
    g = m["g"] @ p["gate_proj"]
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        memory = np.zeros((heads, size, size))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((heads, size, size))
            o = np.zeros((heads, size))
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                write = np.outer(k[b, t, own], v[b, t, own])
                o[h] = (memory[h] + p["u"][h][:, None] * write).T @ r[b, t, own]
                memory[h] = w[b, t, own][:, None] * memory[h] + write
            o = _head_norm(o, p["norm_scale"], p["norm_bias"], layer.norm_eps)
            y[b, t] = (o * _silu(g[b, t])) @ p["out_proj"]
    return y


def _turned(x, angles, halves):
    """Rotate pairs of x [N] by the angles [n]: (i, i + N / 2), or (2 i, 2 i + 1)."""
    x = x.copy()
    for i, angle in enumerate(angles):
        pair = [i, i + len(x) // 2] if halves else [2 * i, 2 * i + 1]
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        x[pair] = x[pair] @ rotation
    return x


def mamba3(layer, params, x, reset=None):
    """S = a S + (1 - l) dt a k_{t-1} u_{t-1}^T + l dt k_t u_t^T, rotating (arXiv 2603.15569)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, rank, states, size = layer.head_count, layer.mimo_rank, layer.state_dim, layer.head_dim
    u, z = (x @ p[name] for name in ("in_proj", "gate_proj"))
    dt = _softplus(x @ p["dt_proj"] + p["dt_bias"])
    s = x @ p["A_proj"]
    with np.errstate(divide="ignore"):
        f = np.where(s >= 0, 1 + s, 1 / (1 - s)) if layer.decay == "rational" else _softplus(s)
    a = np.exp(-dt * np.maximum(f, 1e-4))
    share = _sigmoid(x @ p["trap_proj"])
    speed = np.pi * np.tanh(x @ p["angle_proj"])
    y = np.zeros_like(u)
    for b, h in np.ndindex(x.shape[0], heads):
        own = slice(h * size, (h + 1) * size)
        group = h // (heads // layer.groups)
        memory, phase = np.zeros((states, size)), np.zeros(layer.angles)
        last_k, last_u = np.zeros((rank, states)), np.zeros((rank, size))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory, last_k = np.zeros((states, size)), np.zeros((rank, states))
            phase = phase + dt[b, t, h] * speed[b, t]
            k, q, values = (np.zeros((rank, n)) for n in (states, states, size))
            for r in range(rank):
                for name, made in (("B", k), ("C", q)):
                    row = (x[b, t] @ p[f"{name}_proj"]).reshape(rank, layer.groups, states)[
                        r, group
                    ]
                    row = row / np.sqrt(np.mean(row**2) + layer.norm_eps) * p[f"{name}_norm"]
                    made[r] = _turned(row + p[f"{name}_bias"][h, r], phase, rank > 1)
                values[r] = u[b, t, own] * (p["mimo_x"][h, r] if rank > 1 else 1)
            memory = a[b, t, h] * memory
            for r in range(rank):
                late = (1 - share[b, t, h]) * dt[b, t, h] * a[b, t, h]
                memory = memory + late * np.outer(last_k[r], last_u[r])
                memory = memory + share[b, t, h] * dt[b, t, h] * np.outer(k[r], values[r])
            last_k, last_u = k, values
            for r in range(rank):
                o = memory.T @ q[r] + p["D"][h] * values[r]
                if layer.norm:
                    o = o / np.sqrt(np.mean(o**2) + layer.norm_eps) * p["norm"][own]
                if rank > 1:
                    o = o * _silu(z[b, t, own] * p["mimo_z"][h, r]) * p["mimo_o"][h, r]
                else:
                    o = o * _silu(z[b, t, own])
                y[b, t, own] += o
    return y @ p["out_proj"]


def comba(layer, params, x, reset=None):
    """S = alpha S + beta k (v - s S^T k)^T, read by q - D s k (arXiv 2506.02475)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size, values = layer.heads, layer.key_dim, layer.value_dim
    conv = _Conv(layer.conv_size, bias=False)
    q, k, v = (short_conv(conv, p[f"{n}_conv"], x @ p[f"{n}_proj"], reset) for n in "qkv")
    beta, gate = _sigmoid(x @ p["beta_proj"]), _sigmoid(x @ p["gate_proj"])
    alpha = np.exp(-np.exp(p["A_log"]) * _softplus(x @ p["a_proj"] + p["dt_bias"]))
    s = _sigmoid(p["decay"])
    y = np.zeros((*x.shape[:2], heads * values))
    for b, h in np.ndindex(x.shape[0], heads):
        keys, vals = slice(h * size, (h + 1) * size), slice(h * values, (h + 1) * values)
        memory = np.zeros((size, values))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((size, values))
            q_h = q[b, t, keys] - p["D"][h] * s[h] * k[b, t, keys]
            q_h, k_h = (z / np.sqrt(z @ z + 1e-6) for z in (q_h, k[b, t, keys]))
            missing = v[b, t, vals] - s[h] * memory.T @ k_h
            memory = alpha[b, t, h] * memory + beta[b, t, h] * np.outer(k_h, missing)
            o = memory.T @ q_h / np.sqrt(size)
            y[b, t, vals] = o / np.sqrt(np.mean(o**2) + layer.norm_eps) * p["norm"]
    return (y * gate) @ p["out_proj"]


def gated_deltanet2(layer, params, x, reset=None):
    """S = (I - k (b k)^T) diag(alpha) S + k (w v)^T, gates per channel (arXiv 2605.22791)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size, values = layer.heads, layer.key_dim, layer.value_dim
    conv = _Conv(layer.conv_size, bias=False)
    q, k, v = (short_conv(conv, p[f"{n}_conv"], x @ p[f"{n}_proj"], reset) for n in "qkv")
    erase, write = _sigmoid(x @ p["erase_proj"]), _sigmoid(x @ p["write_proj"])
    erase = erase * (2 if layer.negative_eigenvalues else 1)
    gate = _sigmoid(x @ p["gate_down"] @ p["gate_up"] + p["gate_bias"])
    dt = _softplus(x @ p["decay_down"] @ p["decay_up"] + p["dt_bias"])
    y = np.zeros((*x.shape[:2], heads * values))
    for b, h in np.ndindex(x.shape[0], heads):
        keys, vals = slice(h * size, (h + 1) * size), slice(h * values, (h + 1) * values)
        memory = np.zeros((size, values))
        for t in range(x.shape[1]):
            if reset[b, t]:
                memory = np.zeros((size, values))
            q_h, k_h = (z / np.sqrt(z @ z + 1e-6) for z in (q[b, t, keys], k[b, t, keys]))
            memory = np.exp(-np.exp(p["A_log"][h]) * dt[b, t, keys])[:, None] * memory
            memory = memory - np.outer(k_h, (erase[b, t, keys] * k_h) @ memory)
            memory = memory + np.outer(k_h, write[b, t, vals] * v[b, t, vals])
            o = memory.T @ q_h / np.sqrt(size)
            y[b, t, vals] = o / np.sqrt(np.mean(o**2) + layer.norm_eps) * p["norm"]
    return (y * gate) @ p["out_proj"]
