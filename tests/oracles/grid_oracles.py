"""Recurrences over grids, as float64 NumPy loops; nothing here comes from seqjax."""

import numpy as np

from tests.oracles.layer_oracles import _f64, _sigmoid, _silu, _softplus


def plstm_2d(q, k, v, source, transition, mark, direct):
    """E_p = T_p0 E_0(x-1, y) + T_p1 E_1(x, y-1) + s_p k v^T; o reads the entering edges."""
    rows, columns = q.shape[1:3]
    size = q.shape[-1], v.shape[-1]
    o = np.zeros(v.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[3]):
        leaving = {}
        for x in range(rows):
            for y in range(columns):
                node = (b, x, y, h)
                left = leaving[x - 1, y][0] if x > 0 else np.zeros(size)
                up = leaving[x, y - 1][1] if y > 0 else np.zeros(size)
                own, t = np.outer(k[node], v[node]), transition[node]
                leaving[x, y] = [
                    t[p, 0] * left + t[p, 1] * up + source[node][p] * own for p in (0, 1)
                ]
                seen = mark[node][0] * left + mark[node][1] * up + direct[node] * own
                o[node] = seen.T @ q[node] / np.sqrt(size[0])
    return o


def selective_scan_2d(x, dt, A, B, C, D):
    """h_p = e^(dt_p A_pp) h_p + f_p A_pq h_q + f_p B_p x, at (i-1, j) for p = 0, (i, j-1) for 1."""
    y = np.zeros(x.shape)
    zero = np.zeros((2, *A.shape[2:]))
    for b in range(x.shape[0]):
        states = {}
        for i, j in np.ndindex(x.shape[1:3]):
            before = states.get((i - 1, j), zero), states.get((i, j - 1), zero)
            h = np.zeros_like(zero)
            for p in (0, 1):
                other, step = 1 - p, dt[b, i, j, p][:, None]
                safe = np.where(A[p, p] == 0, 1, A[p, p])
                held = np.where(A[p, p] == 0, step, np.expm1(step * A[p, p]) / safe)
                h[p] = np.exp(step * A[p, p]) * before[p][p] + held * A[p, other] * before[p][other]
                h[p] += held * B[b, i, j, p] * x[b, i, j][:, None]
                y[b, i, j] += h[p] @ C[b, i, j, p]
            states[i, j] = h
            y[b, i, j] += D * x[b, i, j]
    return y


def _turned(z, backwards):
    """Return z [B, X, Y, ...] with the reversed axes reversed."""
    z = z[:, ::-1] if backwards[0] else z
    return z[:, :, ::-1] if backwards[1] else z


def plstm_layer(layer, params, x):
    p, x = _f64(params), _f64(x)
    lead, heads = x.shape[:3], layer.heads
    q, k, v = (np.reshape(x @ p[f"{n}_proj"], (*lead, heads, -1)) for n in "qkv")

    def gate(name, factor=1.0):
        bias = p[f"{name}_bias"]
        return np.reshape(factor * (x @ p[f"{name}_proj"]), (*lead, *bias.shape)) + bias

    sigma, mu, tau = (
        _sigmoid(gate("source")),
        _sigmoid(gate("mark")),
        np.tanh(5 * gate("transition")),
    )
    direct = _sigmoid(gate("direct"))
    o = np.zeros(v.shape)
    for index, backwards in enumerate(layer.flips):
        s, m = np.zeros((2, *lead, heads, 2))
        t = np.zeros((*lead, heads, 2, 2))
        for node in np.ndindex(*lead):
            for h in range(heads):
                write, read, move = (z[node][index, h] for z in (sigma, mu, tau))
                if layer.mode == "P":
                    alpha = _sigmoid(gate("orientation", 0.5 / layer.dim)[node][index, h])
                    s[node][h] = alpha * write[0], (1 - alpha) * write[0]
                    t[node][h] = [[alpha * move[0]] * 2, [(1 - alpha) * move[0]] * 2]
                    if layer.complement:
                        s[node][h, 1] = 1 - alpha * write[0]
                        t[node][h, 1] = 1 - alpha * move[0]
                    m[node][h] = read[0]
                else:
                    s[node][h], m[node][h] = write, read
                    t[node][h] = [[move[0], move[2]], [0, move[1]]]
        arrays = [_turned(z, backwards) for z in (q, k, v, s, t, m)]
        o += _turned(plstm_2d(*arrays, np.zeros((*lead, heads))), backwards)
    size = q.shape[-1]
    o += direct[..., None] * np.sum(q * k, axis=-1, keepdims=True) * v / np.sqrt(size)
    o = o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + layer.norm_eps) * p["norm"]
    return o.reshape(x.shape) @ p["out_proj"]


def chimera(layer, params, x):
    p, x = _f64(params), _f64(x)
    lead, count = x.shape[:3], len(layer.flips)
    u = _silu(x @ p["in_proj"])
    dt = np.reshape(u @ p["dt_down"] @ p["dt_up"], (*lead, *p["dt_bias"].shape)) + p["dt_bias"]
    B, C = (np.reshape(u @ p[f"{n}_proj"], (*lead, count, 2, -1)) for n in "BC")
    o = p["D"] * u
    for index, backwards in enumerate(layer.flips):
        own, cross = -np.exp(p["A_log"][index]), p["A_cross"][index]
        A = np.array([[own[0], cross[0]], [cross[1], own[1]]])
        arrays = u, _softplus(dt[:, :, :, index]), B[:, :, :, index], C[:, :, :, index]
        z, step, b, c = (_turned(a, backwards) for a in arrays)
        o = o + _turned(selective_scan_2d(z, step, A, b, c, np.zeros_like(p["D"])), backwards)
    return (o * _silu(x @ p["gate_proj"])) @ p["out_proj"]
