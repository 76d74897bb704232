"""Layers with a matrix state as float64 NumPy loops, written from the papers' equations.

The functions have the form of those in `layer_oracles`, and nothing here comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _Conv, _f64, _resets, _sigmoid, _silu, _softplus, short_conv


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
            decay = layer.decay_factor * np.exp(-np.exp(p["A_log"][h]) * dt[b, t, h])
            written = np.outer(B_t, layer.write_factor * dt[b, t, h] * u_t[h])
            memory[h] = decay * memory[h] + written
            if layer.state_limit is not None:  # a largest norm
                memory[h] *= min(1, layer.state_limit.largest / np.linalg.norm(memory[h]))
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


def retnet(layer, params, x, reset=None):
    """S = (1 - 2^(-5-h)) S + k v^T with q, k turned by absolute position (arXiv 2307.08621)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size, values = layer.heads, layer.key_dim, layer.value_dim
    frequency = layer.rope_base ** (-2.0 * np.arange(size // 2) / size)

    def rotate(z, t):
        turned = (z[: size // 2] + 1j * z[size // 2 :]) * np.exp(1j * t * frequency)
        return np.concatenate([turned.real, turned.imag])

    q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")

    def update(memory, b, t):
        out = np.zeros((heads, values))
        for h in range(heads):
            q_h, k_h = (rotate(z[b, t].reshape(heads, size)[h], t) for z in (q, k))
            v_h = v[b, t].reshape(heads, values)[h]
            memory[h] = (1 - 2.0 ** (-5 - h)) * memory[h] + np.outer(k_h, v_h)
            out[h] = _rms(memory[h].T @ q_h / np.sqrt(size), layer.norm_eps) * p["norm"]
        return memory, (out.reshape(-1) * _silu(x[b, t] @ p["gate_proj"])) @ p["out_proj"]

    return _memory_loop(x, reset, heads, size, values, update)


def lightning_attention(layer, params, x, reset=None):
    """S = exp(-s_h) S + k v^T with fixed slopes, q, k, v after silu (arXiv 2307.14995)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.key_dim
    if layer.slopes == "linear":
        slopes = [8 * h / heads for h in range(heads)]
    elif layer.slopes == "minimax":
        slopes = [2 ** (-8 * (h + 1) / heads) * (1 + 1e-5) for h in range(heads)]
    else:  # of three heads: two of the series for two, and the first of that for four
        slopes = {2: [2**-4, 2**-8], 3: [2**-4, 2**-8, 2**-2]}[heads]
        slopes = [s * (1 + 1e-5) for s in slopes]
    q, k, v = (_silu(x @ p[f"{name}_proj"]) for name in "qkv")
    gate = x @ p["gate_proj"] if "gate_proj" in p else x @ p["gate_down"] @ p["gate_up"]

    def update(memory, b, t):
        out = np.zeros((heads, size))
        for h in range(heads):
            q_h, k_h, v_h = (z[b, t].reshape(heads, size)[h] for z in (q, k, v))
            memory[h] = np.exp(-slopes[h]) * memory[h] + np.outer(k_h, v_h)
            out[h] = memory[h].T @ q_h
        y = _rms(out.reshape(-1), layer.norm_eps) * p["norm"]
        return memory, (y * _sigmoid(gate[b, t])) @ p["out_proj"]

    return _memory_loop(x, reset, heads, size, size, update)


def _delta_values(layer, p, x, reset, mapped):
    """Return q, k, v after projections and convolutions; "silu" convolutions where not mapped."""
    made = []
    for name in "qkv":
        conv = _Conv(layer.conv_size, bias=False)
        conv.activation = None if mapped and name != "v" else "silu"
        made.append(short_conv(conv, p[f"{name}_conv"], x @ p[f"{name}_proj"], reset))
    return made


def _fast_weight_features(layer, z):
    """Return the features of a query or key of a fast weight programmer (arXiv 2102.11174)."""
    if layer.feature_map == "elu":
        made = np.where(z > 0, z + 1, np.exp(z))
    else:
        r = np.maximum(np.concatenate([z, -z]), 0)
        rotated = [
            [r[i] * r[(i - j) % len(r)] for i in range(len(r))]
            for j in range(1, layer.dpfp_order + 1)
        ]
        made = np.concatenate(rotated)
    return made / (made.sum() + 1e-6)


def deltanet(layer, params, x, reset=None):
    """S = (I - beta k k^T) S + beta k v^T for each update, after S = alpha S.

    DeltaNet (2406.06484), gated (2412.06464), negative eigenvalues (2411.12537), several updates
    (2502.10297), feature maps (2102.11174).
    """
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    size, values, count = layer.key_dim, layer.value_dim, getattr(layer, "updates", 1)
    heads = layer.value_heads or layer.heads
    q, k, v = _delta_values(layer, p, x, reset, layer.feature_map is not None)
    beta = _sigmoid(x @ p["beta_proj"]) * (2 if layer.negative_eigenvalues else 1)
    alpha = np.ones((*x.shape[:2], heads))
    if layer.gated:
        alpha = np.exp(-np.exp(p["A_log"]) * _softplus(x @ p["a_proj"] + p["dt_bias"]))

    def mapped(z):
        if layer.feature_map is None:
            return z / np.sqrt(z @ z + 1e-6)
        return _fast_weight_features(layer, z)

    def update(memory, b, t):
        out = np.zeros((heads, values))
        for h in range(heads):
            of_keys = h // (heads // layer.heads)
            memory[h] = alpha[b, t, h] * memory[h]
            for j in range(count):
                k_h = mapped(k[b, t].reshape(count, layer.heads, size)[j, of_keys])
                v_h = v[b, t].reshape(count, heads, values)[j, h]
                beta_h = beta[b, t].reshape(count, heads)[j, h]
                keep = np.eye(len(k_h)) - beta_h * np.outer(k_h, k_h)
                memory[h] = keep @ memory[h] + beta_h * np.outer(k_h, v_h)
            q_h = mapped(q[b, t].reshape(layer.heads, size)[of_keys])
            o = memory[h].T @ q_h * (1 if layer.feature_map else 1 / np.sqrt(size))
            out[h] = _rms(o, layer.norm_eps) * p["norm"]
        y = out.reshape(-1)
        if layer.gates_output:
            y = y * _silu(x[b, t] @ p["gate_proj"])
        return memory, y @ p["out_proj"]

    rows = len(mapped(np.ones(size)))
    return _memory_loop(x, reset, heads, rows, values, update)


def kda(layer, params, x, reset=None):
    """S = (I - beta k k^T) diag(alpha) S + beta k v^T, alpha per key channel (arXiv 2510.26692)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    size, values, heads = layer.key_dim, layer.value_dim, layer.value_heads or layer.heads
    q, k, v = _delta_values(layer, p, x, reset, mapped=False)
    beta = _sigmoid(x @ p["beta_proj"]) * (2 if layer.negative_eigenvalues else 1)
    if layer.low_rank:
        dt, gate = (x @ p[f"{name}_down"] @ p[f"{name}_up"] for name in ("decay", "gate"))
    else:
        dt, gate = x @ p["decay_proj"], x @ p["gate_proj"]
    gate = gate + (p["gate_bias"] if layer.gate_bias else 0)
    dt = (dt + p["dt_bias"]).reshape(*x.shape[:2], heads, size)

    def update(memory, b, t):
        out = np.zeros((heads, values))
        for h in range(heads):
            of_keys = h // (heads // layer.heads)
            q_h, k_h = (z[b, t].reshape(layer.heads, size)[of_keys] for z in (q, k))
            q_h, k_h = (z / np.sqrt(z @ z + 1e-6) for z in (q_h, k_h))
            rate = np.exp(p["A_log"][h])
            if layer.decay_bound is None:
                alpha = np.exp(-rate * _softplus(dt[b, t, h]))
            else:
                alpha = np.exp(layer.decay_bound * _sigmoid(rate * dt[b, t, h]))
            keep = np.eye(size) - beta[b, t, h] * np.outer(k_h, k_h)
            v_h = v[b, t].reshape(heads, values)[h]
            memory[h] = keep @ (alpha[:, None] * memory[h]) + beta[b, t, h] * np.outer(k_h, v_h)
            out[h] = _rms(memory[h].T @ q_h / np.sqrt(size), layer.norm_eps) * p["norm"]
        return memory, (out.reshape(-1) * _sigmoid(gate[b, t])) @ p["out_proj"]

    return _memory_loop(x, reset, heads, size, values, update)
