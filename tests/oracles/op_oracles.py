"""Oracles of the ops: float64 NumPy loops, written from the equations.

Each takes the op's arrays, the initial state and the reset, and returns (outputs, final state).
"""

import numpy as np


def linear_scan(inputs, h, reset, reverse=False):
    a, x = inputs["decay"], inputs["x"]
    a = np.broadcast_to(a, (*x.shape[: 3 - a.ndim], *a.shape))
    a = np.broadcast_to(a, x.shape)
    y = np.zeros(x.shape, np.result_type(a, x))
    for b in range(x.shape[0]):
        state = h[b]
        steps = range(x.shape[1])
        for t in reversed(steps) if reverse else steps:
            state = x[b, t] if reset[b, t] else a[b, t] * state + x[b, t]
            y[b, t] = state
    final = y[:, 0] if reverse else y[:, -1]
    return y, final


def log_scan(inputs, h, reset, semiring="log"):
    d, x = inputs["log_decay"], inputs["x"]
    d = np.zeros(x.shape) if d is None else np.broadcast_to(d, x.shape)
    combine = np.logaddexp if semiring == "log" else np.maximum
    y = np.zeros(x.shape)
    for b in range(x.shape[0]):
        state = h[b]
        for t in range(x.shape[1]):
            state = x[b, t] if reset[b, t] else combine(state + d[b, t], x[b, t])
            y[b, t] = state
    return y, y[:, -1]


def step_scan(inputs, state, reset):
    """fast = tanh(W fast + x - slow^2), slow = slow + rate (fast - slow), y = fast slow."""
    params, x = inputs["params"], inputs["x"]
    y = np.zeros(x.shape)
    final = {name: s.copy() for name, s in state.items()}
    for b in range(x.shape[0]):
        fast, slow = final["fast"][b], final["slow"][b]
        for t in range(x.shape[1]):
            if reset[b, t]:
                fast, slow = np.zeros_like(fast), np.zeros_like(slow)
            fast = np.tanh(params["W"] @ fast + x[b, t] - slow**2)
            slow = slow + params["rate"] * (fast - slow)
            y[b, t] = fast * slow
        final["fast"][b], final["slow"][b] = fast, slow
    return y, final


def block_scan(inputs, h, reset, reverse=False):
    A, x = inputs["transition"], inputs["x"]
    y = np.zeros(x.shape, np.result_type(A, x))
    for b, g in np.ndindex(x.shape[0], x.shape[2]):
        state = h[b, g]
        steps = range(x.shape[1])
        for t in reversed(steps) if reverse else steps:
            block = A[(b, t, g)[5 - A.ndim :]]  # axes in front may be missing
            state = x[b, t, g] if reset[b, t] else block @ state + x[b, t, g]
            y[b, t, g] = state
    final = y[:, 0] if reverse else y[:, -1]
    return y, final


def selective_scan(inputs, h, reset, decay="exp"):
    x, dt, A, B, C, D = (inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D"))
    y, h = np.zeros(x.shape), h.copy()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for d in range(x.shape[2]):
                if reset[b, t]:
                    h[b, d] = 0
                if decay == "online":
                    a = 1 - dt[b, t, d] * B[b, t] ** 2
                else:
                    a = np.exp(dt[b, t, d] * A[d])
                    a = 2 * a - 1 if decay == "signed" else a
                h[b, d] = a * h[b, d] + dt[b, t, d] * B[b, t] * x[b, t, d]
                y[b, t, d] = C[b, t] @ h[b, d] + D[d] * x[b, t, d]
    return y, h


def ssm_scan(inputs, h, reset):
    u, A, B, C = (inputs[name] for name in "uABC")
    y, h = np.zeros(u.shape), h.copy()
    for b, t in np.ndindex(u.shape[:2]):
        if reset[b, t]:
            h[b] = 0
        h[b] = np.exp(A) * h[b] + B * u[b, t][:, None]
        y[b, t] = np.sum(C * h[b], axis=-1).real
    return y, h


def linear_attention(inputs, S, reset, exclusive=False):
    q, k, v = (inputs[name] for name in "qkv")
    g = inputs.get("log_decay")
    o = np.zeros(v.shape, np.result_type(q, v) if g is None else np.result_type(q, v, g))
    S = S.astype(o.dtype)
    for b, t, h in np.ndindex(v.shape[:3]):
        shared = h * q.shape[2] // v.shape[2]  # the head of q and k
        if reset[b, t]:
            S[b, h] = 0
        before, write = S[b, h].copy(), np.outer(k[b, t, shared], v[b, t, h])
        if g is not None:
            S[b, h] = np.exp(np.atleast_1d(g[b, t, h]))[:, None] * S[b, h]
        if "value_log_decay" in inputs:
            S[b, h] = S[b, h] * np.exp(inputs["value_log_decay"][b, t, h])
        S[b, h] = S[b, h] + write
        read = before + inputs["bonus"][h][:, None] * write if exclusive else S[b, h]
        o[b, t, h] = read.T @ q[b, t, shared] / np.sqrt(q.shape[-1])
    return o, S


def normalized_attention(inputs, state, reset):
    """o_t = S_t^T q_t and z_t = n_t^T q_t, with n_t the state for values of 1."""
    S, n = state
    o, S = linear_attention(inputs, S, reset)
    ones = inputs | {"v": np.ones_like(inputs["v"][..., :1])}
    z, n = linear_attention(ones, n[..., None], reset)
    return (o, z[..., 0]), (S, n[..., 0])


def delta_rule(inputs, S, reset):
    q, k, v, beta = (inputs[name] for name in ("q", "k", "v", "beta"))
    g = inputs.get("log_decay")
    o, S = np.zeros(v.shape), S.copy()
    identity = np.eye(q.shape[-1])
    for b, t, h in np.ndindex(v.shape[:3]):
        shared = h * q.shape[2] // v.shape[2]  # the head of q and k
        key, strength = k[b, t, shared], beta[b, t, h]
        if reset[b, t]:
            S[b, h] = 0
        decay = np.ones(1) if g is None else np.exp(np.atleast_1d(g[b, t, h]))
        transition = (identity - strength * np.outer(key, key)) * decay
        S[b, h] = transition @ S[b, h] + strength * np.outer(key, v[b, t, h])
        o[b, t, h] = S[b, h].T @ q[b, t, shared] / np.sqrt(q.shape[-1])
    return o, S


def fused_delta_rule(inputs, S, reset):
    """Normalize q and k, apply the gate of the decays, and run `delta_rule`."""
    made = dict(inputs)
    for name in ("q", "k"):
        x = inputs[name]
        made[name] = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    x = inputs["log_decay"] + inputs["dt_bias"]
    rate = np.exp(inputs["A_log"]).reshape(-1, *[1] * (x.ndim - 3))
    made["log_decay"] = -rate * np.logaddexp(x, 0)
    return delta_rule(made, S, reset)


def momentum_delta_rule(inputs, state, reset):
    q, k, v, beta, g, h = (
        inputs[name] for name in ("q", "k", "v", "beta", "log_decay", "log_momentum")
    )
    o, state = np.zeros(v.shape), state.copy()
    for b, t, n in np.ndindex(q.shape[:3]):
        if reset[b, t]:
            state[b, n] = 0
        M, P = state[b, n]
        P = np.exp(h[b, t, n]) * P + beta[b, t, n] * np.outer(
            k[b, t, n], v[b, t, n] - M.T @ k[b, t, n]
        )
        M = np.exp(g[b, t, n]) * M + P
        state[b, n] = M, P
        o[b, t, n] = M.T @ q[b, t, n] / np.sqrt(q.shape[-1])
    return o, state


def generalized_delta_rule(inputs, S, reset):
    q, k, v, a, b = (inputs[name] for name in "qkvab")
    g = inputs.get("log_decay")
    o, S = np.zeros(v.shape), S.copy()
    a, b = (np.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (a, b))
    for i, t, h in np.ndindex(v.shape[:3]):
        shared = h * q.shape[2] // v.shape[2]  # the head of q and k
        if reset[i, t]:
            S[i, h] = 0
        decay = np.ones(q.shape[-1]) if g is None else np.exp(g[i, t, h]) * np.ones(q.shape[-1])
        transition = np.diag(decay) + np.outer(b[i, t, h], a[i, t, h])
        S[i, h] = transition @ S[i, h] + np.outer(k[i, t, shared], v[i, t, h])
        o[i, t, h] = S[i, h].T @ q[i, t, shared] / np.sqrt(q.shape[-1])
    return o, S


def running_softmax(inputs, state, reset):
    """o_t = sum_i exp(s_i) v_i / sum_i exp(s_i), as (maximum, normaliser, weighted sum)."""
    score, weight, value = (inputs[name] for name in ("score", "weight", "value"))
    ys = {name: np.zeros(array.shape) for name, array in inputs.items()}
    for b in range(score.shape[0]):
        s, w, v = state["score"][b], state["weight"][b], state["value"][b]
        for t in range(score.shape[1]):
            if reset[b, t]:
                s, w, v = score[b, t], weight[b, t], value[b, t]
            else:
                top = max(s, score[b, t])
                old, new = np.exp(s - top), np.exp(score[b, t] - top)
                s, w = top, old * w + new * weight[b, t]
                v = old * v + new * value[b, t]
            ys["score"][b, t], ys["weight"][b, t], ys["value"][b, t] = s, w, v
    return ys, {name: y[:, -1] for name, y in ys.items()}
