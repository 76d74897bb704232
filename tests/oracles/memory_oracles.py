"""Layers whose memory is solved, kept at several scales or trained, as float64 NumPy loops.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _Conv, _f64, _resets, _sigmoid, _silu, _softplus, short_conv


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


def _gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def _gelu_slope(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return (1 + np.tanh(inner)) / 2 + x * slope / (2 * np.cosh(inner) ** 2)


def _layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def _norm_pull(x, scale, eps, change):
    """Return the gradient at x [K] of a loss with the gradient `change` at its layer norm."""
    size, root = len(x), np.sqrt(x.var() + eps)
    unit = (x - x.mean()) / root
    jacobian = (np.eye(size) - 1 / size - np.outer(unit, unit) / size) / root
    return jacobian.T @ (scale * change)


def _rotate(x, index, base):
    half = len(x) // 2
    turned = x.copy()
    for j in range(half):
        angle = index * base ** (-j / half)
        turned[j] = x[j] * np.cos(angle) - x[j + half] * np.sin(angle)
        turned[j + half] = x[j + half] * np.cos(angle) + x[j] * np.sin(angle)
    return turned


def _network(weights, z):
    """Return z W1 + b1, or gelu(z W1 + b1) W2 + b2; `weights` has the biases, or None for none."""
    for i, (W, b) in enumerate(weights):
        z = _gelu(z) if i else z
        z = z @ W + (0 if b is None else b)
    return z


def _network_gradient(weights, z, loss_gradient):
    """Return the gradients of the weights from that of the output."""
    W, b = weights[0]
    hidden = z @ W + (0 if b is None else b)
    if len(weights) == 1:
        change = loss_gradient(hidden)
        return [(np.outer(z, change), change)]
    change = loss_gradient(_network(weights, z))
    back = (weights[1][0] @ change) * _gelu_slope(hidden)
    return [(np.outer(z, back), back), (np.outer(_gelu(hidden), change), change)]


def _combine(*terms):
    """Return the sum of factor times weights of (factor, weights) pairs."""
    total = []
    for layer in zip(*(weights for _, weights in terms), strict=True):
        pairs = list(zip((factor for factor, _ in terms), layer, strict=True))
        W = sum(factor * W for factor, (W, _) in pairs)
        b = sum(factor * b for factor, (_, b) in pairs) if layer[0][1] is not None else None
        total.append((W, b))
    return total


def _start(p, head):
    names = [i for i in (1, 2) if f"W{i}" in p]
    return [(p[f"W{i}"][head], p[f"b{i}"][head] if f"b{i}" in p else None) for i in names]


def ttt(layer, params, x, reset=None):
    """W_t = W_a - s_i sum r_j grad l_j(W_a), o = q + LN(f(W_t; q)) (arXiv 2407.04620)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    conv = _Conv(layer.conv_size, bias=True)
    conv.activation = None
    q, k = (short_conv(conv, p[f"{n}_conv"], x @ p["qk_proj"], reset) for n in "qk")
    q, k, v = (y.reshape(*x.shape[:2], layer.heads, -1) for y in (q, k, x @ p["v_proj"]))
    size, eps = q.shape[-1], layer.norm_eps
    rate = layer.base_rate * _sigmoid(x @ p["rate_proj"] + p["rate_bias"]) / size
    o = np.zeros(q.shape)
    for b, h in np.ndindex(len(x), layer.heads):
        scale, bias = p["inner_scale"][h], p["inner_bias"][h]
        start = anchor = _start(p, h)
        index, total = 0, _combine((0, start))
        for t in range(x.shape[1]):
            if reset[b, t]:
                anchor, index, total = start, 0, _combine((0, start))
            query, key = (_rotate(z[b, t, h], index, layer.rotary_base) for z in (q, k))
            target = v[b, t, h] - key

            def gradient(y, target=target, scale=scale, bias=bias):
                return _norm_pull(y, scale, eps, _layer_norm(y, scale, bias, eps) - target)

            change = _network_gradient(anchor, key, gradient)
            total = _combine((1, total), (rate[b, t, h], change))
            token = max(p["token_scale"][index] + 1 / (index + 1), 0)
            weights = _combine((1, anchor), (-token, total))
            o[b, t, h] = query + _layer_norm(_network(weights, query), scale, bias, eps)
            index += 1
            if index == layer.mini_batch:
                anchor, index, total = weights, 0, _combine((0, start))
    o = _layer_norm(o.reshape(x.shape), p["norm_scale"], p["norm_bias"], eps)
    return (o * _gelu(x @ p["gate_proj"])) @ p["out_proj"]


def titans(layer, params, x, reset=None):
    """P = eta P - theta grad l(M_a), M = (1 - alpha) M + P, o = f(M; q) (arXiv 2501.00663)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    conv = _Conv(layer.conv_size, bias=False)
    q, k, v = (short_conv(conv, p[f"{n}_conv"], x @ p[f"{n}_proj"], reset) for n in "qkv")
    q, k, v = (y.reshape(*x.shape[:2], layer.heads, -1) for y in (q, k, v))
    q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    theta, eta, alpha = (
        _sigmoid(x @ p[f"{n}_proj"] + p[f"{n}_bias"]) for n in ("rate", "momentum", "forget")
    )
    theta = layer.base_rate * theta
    o = np.zeros(q.shape)
    for b, h in np.ndindex(len(x), layer.heads):
        start = anchor = M = _start(p, h)
        P, index = _combine((0, start)), 0
        for t in range(x.shape[1]):
            if reset[b, t]:
                anchor, M, P, index = start, start, _combine((0, start)), 0

            def gradient(y, target=v[b, t, h]):
                return 2 * (y - target)

            change = _network_gradient(anchor, k[b, t, h], gradient)
            P = _combine((eta[b, t, h], P), (-theta[b, t, h], change))
            M = _combine((1 - alpha[b, t, h], M), (1, P))
            y = _network(M, q[b, t, h])
            o[b, t, h] = y / np.sqrt(np.mean(y * y) + layer.norm_eps) * p["norm"]
            index += 1
            if index == layer.mini_batch:
                anchor, index = M, 0
    return (o.reshape(x.shape) * _silu(x @ p["gate_proj"])) @ p["out_proj"]


def _polynomial(powers, z):
    found = [powers[0], *(powers[1] * z)]
    if len(powers) > 2:
        for i in range(len(z)):
            for j in range(i, len(z)):
                found.append(powers[2] * z[i] * z[j] * (1 if i == j else np.sqrt(2)))
    return np.array(found)


def _newton_schulz(X, steps):
    if steps == 0:
        return X
    X = X / np.sqrt(np.sum(X * X) + 1e-12)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X


def atlas(layer, params, x, reset=None):
    """P = theta P + grad over a window, M = (1 - alpha) M - eta NS(P), o = M^T q (2505.23735)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    conv = _Conv(layer.conv_size, bias=False)
    q, k, v = (short_conv(conv, p[f"{n}_conv"], x @ p[f"{n}_proj"], reset) for n in "qkv")
    q, k, v = (y.reshape(*x.shape[:2], layer.heads, -1) for y in (q, k, v))
    q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    eta, theta, alpha, weight = (
        _sigmoid(x @ p[f"{n}_proj"] + p[f"{n}_bias"])
        for n in ("rate", "momentum", "forget", "context")
    )
    o = np.zeros(v.shape)
    for b, h in np.ndindex(len(x), layer.heads):
        M, P, first = p["memory"][h], 0, 0
        for t in range(x.shape[1]):
            if reset[b, t]:
                M, P, first = p["memory"][h], 0, t
            G = np.zeros_like(M)
            for i in range(max(first, t - layer.window + 1), t + 1):
                key = _polynomial(p["powers"], k[b, i, h])
                G += weight[b, i, h] * 2 * np.outer(key, M.T @ key - v[b, i, h])
            P = theta[b, t, h] * P + G
            pushed = layer.base_rate * eta[b, t, h] * _newton_schulz(P, layer.steps)
            M = (1 - alpha[b, t, h]) * M - pushed
            y = M.T @ _polynomial(p["powers"], q[b, t, h])
            o[b, t, h] = y / np.sqrt(np.mean(y * y) + layer.norm_eps) * p["norm"]
    return (o.reshape(x.shape) * _silu(x @ p["gate_proj"])) @ p["out_proj"]


def _attention(q, k, v):
    scores = q @ k.T / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


def block_recurrent(layer, params, x, reset=None):
    """Tokens attend to a window and to states; the states change after a block (2203.07852)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    heads, size = layer.heads, layer.dim // layer.heads
    q, k, v, cross = (
        (x @ p[f"{n}_proj"]).reshape(*x.shape[:2], heads, size) for n in ("q", "k", "v", "cross")
    )

    def of_states(C):
        n = _layer_norm(C, p["state_norm"], p["state_positions"], layer.norm_eps)
        names = ("q", "k", "v", "cross")
        return [(n @ p[f"state_{name}_proj"]).reshape(-1, heads, size) for name in names]

    o = np.zeros((*x.shape[:2], 2, heads, size))
    gate = _sigmoid(p["state_gate"])
    for b in range(len(x)):
        C, begin, first = p["state_start"], 0, 0
        for t in range(x.shape[1]):
            if reset[b, t]:
                C, begin, first = p["state_start"], t, t
            Q, K, V, P = of_states(C)
            seen = range(max(first, t - layer.window + 1), t + 1)
            for h in range(heads):
                keys = np.stack([_rotate(k[b, i, h], i - t, layer.rotary_base) for i in seen])
                o[b, t, 0, h] = _attention(q[b, t, h], keys, v[b, seen.start : t + 1, h])
                o[b, t, 1, h] = _attention(cross[b, t, h], K[:, h], V[:, h])
            if t - begin + 1 == layer.window:
                z = np.zeros((len(C), 2, heads, size))
                for s, h in np.ndindex(len(C), heads):
                    z[s, 0, h] = _attention(Q[s, h], K[:, h], V[:, h])
                    of_block = (b, slice(begin, t + 1), h)
                    z[s, 1, h] = _attention(P[s, h], k[of_block], v[of_block])
                z = z.reshape(len(C), -1) @ p["state_out_proj"] + p["state_out_bias"]
                C, begin = gate * C + (1 - gate) * z, t + 1
    return o.reshape(*x.shape[:2], -1) @ p["out_proj"]
