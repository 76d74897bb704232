"""State-space layers as float64 NumPy loops over single positions, written from the equations.

The conventions are those of `layer_oracles`.
"""

import math

import numpy as np

from tests.oracles.layer_oracles import (
    _complex,
    _Conv,
    _f64,
    _resets,
    _sigmoid,
    _silu,
    short_conv,
    stable_rate,
)


def _relu(x):
    return np.maximum(x, 0)


def _gelu(x):
    """Return the form of GELU with tanh."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _glu(y, weight):
    value, gate = np.split(_gelu(y) @ weight, 2)
    return value * _sigmoid(gate)


def _loop(x, reset, start, step):
    """Return y [B, T, D] of `step(state, x_t) -> (state, y_t)`, from `start()` at resets."""
    x, reset = _f64(x), _resets(x, reset)
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        state = start()
        for t in range(x.shape[1]):
            if reset[b, t]:
                state = start()
            state, y[b, t] = step(state, x[b, t])
    return y


def longhorn(layer, params, x, reset=None):
    """h = (1 - e k^2) h + e k u, e = b / (1 + b k.k); y = h q + D u (arXiv 2407.14207)."""
    p, x = _f64(params), _f64(x)
    rank, states = layer.rank, layer.state_dim
    inner = p["D"].shape[0]
    u = short_conv(
        _Conv(layer.conv_size, bias=True), p["conv"], x @ p["in_proj"], _resets(x, reset)
    )

    def step(h, both):
        x_t, u_t = both[: layer.dim], both[layer.dim :]
        r, k, q = np.split(u_t @ p["x_proj"], [rank, rank + states])
        rate = _sigmoid(r @ p["dt_proj"] + p["dt_bias"])
        e = rate / (1 + rate * (k @ k))
        h = (1 - np.outer(e, k**2)) * h + np.outer(e * u_t, k)
        out = (h @ q + p["D"] * u_t) * _silu(x_t @ p["gate_proj"])
        return h, np.pad(out @ p["out_proj"], (0, inner))

    both = np.concatenate([x, u], axis=-1)
    return _loop(both, reset, lambda: np.zeros((inner, states)), step)[..., : layer.dim]


def s4d(layer, params, x, reset=None):
    """Zero-order hold of h' = Lambda h + B x in every channel; y = C h + D x (arXiv 2206.11893)."""
    p = _f64(params)
    lam, dt = -stable_rate(layer, p["log_A_real"]), np.exp(p["log_step"])[:, None]
    B, C, twice = p["B"], p["C"], 1
    if layer.spectrum != "real":
        lam, B, C, twice = lam + 1j * p["A_imag"], _complex(B), _complex(C), 2
    decay = np.exp(dt * lam)
    write = (decay - 1) / lam * B

    def step(h, x_t):
        h = decay * h + write * x_t[:, None]
        y = twice * np.sum(C * h, axis=-1).real + p["D"] * x_t
        return h, _glu(y, p["out_proj"]) if layer.output_glu else y

    return _loop(x, reset, lambda: np.zeros(decay.shape, complex), step)


class _Dss:
    """The hyperparameters of the state space inside a GSS."""

    spectrum, output_glu, reparameterization = "dss", False, "exp"


def gss(layer, params, x, reset=None):
    """y = (ssm(norm(gelu(x W_u))) W_s * gelu(x W_v)) W_o (arXiv 2206.13947)."""
    p, x = _f64(params), _f64(x)
    u = _gelu(x @ p["in_proj"])
    if layer.inner_norm:
        u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + layer.norm_eps)
        u = u * p["norm_scale"] + p["norm_bias"]
    u = s4d(_Dss, p["ssm"], u, reset)
    return (u @ p["ssm_proj"] * _gelu(x @ p["gate_proj"])) @ p["out_proj"]


def damped_ema(layer, params, x, reset=None):
    """h = (1 - p a) h + p beta x; y = silu(gamma h / sqrt(N) + omega x) (arXiv 2209.10655)."""
    w = _f64(params)
    p, a = _sigmoid(w["delta"]), _sigmoid(w["alpha"])

    def step(h, x_t):
        h = (1 - p * a) * h + p * w["beta"] * x_t[:, None]
        y = np.sum(w["gamma"] * h, axis=-1) / np.sqrt(layer.state_dim)
        return h, _silu(y + w["omega"] * x_t)

    return _loop(x, reset, lambda: np.zeros(p.shape), step)


def cema(layer, params, x, reset=None):
    """h = (1 - p d) exp(i phi) h + p x; y = Re(gamma h) / sqrt(N) + omega x (arXiv 2404.08801)."""
    w = _f64(params)
    p, d = _sigmoid(w["alpha"]), _sigmoid(w["delta"])
    phases = np.outer(_sigmoid(w["theta"]), np.arange(1, layer.state_dim + 1))
    decay = (1 - p * d) * np.exp(2j * np.pi * phases / layer.state_dim)
    gamma = _complex(w["gamma"]) / np.sqrt(layer.state_dim)

    def step(h, x_t):
        h = decay * h + p * x_t[:, None]
        return h, np.sum(gamma * h, axis=-1).real + w["omega"] * x_t

    return _loop(x, reset, lambda: np.zeros(p.shape, complex), step)


def linoss(layer, params, x, reset=None):
    """z, w: velocity and position of forced oscillators; y = Re(w C) + D x (arXiv 2410.03943)."""
    p = _f64(params)
    A, s = _relu(p["A_diag"]), _sigmoid(p["step"])
    B, C = _complex(p["B"]), _complex(p["C"])

    def step(state, x_t):
        z, w = state
        z = z + s * (x_t @ B) - s * A * w
        if layer.discretization == "im":
            z = z / (1 + s**2 * A)
        w = w + s * z
        y = (w @ C).real + p["D"] * x_t
        return (z, w), _glu(y, p["out_proj"]) if layer.output_glu else y

    return _loop(x, reset, lambda: (np.zeros(A.shape, complex),) * 2, step)


def _memory_layer(layer, p, x, reset, start, remember):
    """Return relu([m, x] W_y + b_y) with m the memories of relu(x W_u + b_u)."""

    def step(state, x_t):
        state, m = remember(state, _relu(x_t @ p["in_proj"] + p["in_bias"]))
        features = np.concatenate([m.reshape(-1), x_t])
        return state, _relu(features @ p["out_proj"] + p["out_bias"])

    return _loop(x, reset, start, step)


def lmu(layer, params, x, reset=None):
    """Zero-order hold of theta m' = A m + B u, Padé's delay (arXiv 2102.11417)."""
    size = layer.state_dim
    A, B = np.zeros((size, size)), np.zeros(size)
    for i in range(size):
        B[i] = (-1) ** i * (2 * i + 1) / layer.window
        for j in range(size):
            A[i, j] = (2 * i + 1) / layer.window * (-1 if i < j else (-1) ** (i - j + 1))
    # exp(A) and the integral of exp(A s) B over a step, as Taylor series.
    transition = sum(np.linalg.matrix_power(A, n) / math.factorial(n) for n in range(40))
    write = sum(np.linalg.matrix_power(A, n) / math.factorial(n + 1) for n in range(40)) @ B

    def remember(m, u):
        m = np.stack([transition @ m[c] + write * u[c] for c in range(len(u))])
        return m, m

    zeros = np.zeros((layer.channels, size))
    return _memory_layer(layer, _f64(params), x, reset, lambda: zeros, remember)


def _hippo_legs(size):
    """Return A and B of m' = -A m + B u."""
    A, B = np.zeros((size, size)), np.sqrt(2 * np.arange(size) + 1.0)
    for i in range(size):
        A[i, i] = i + 1
        for j in range(i):
            A[i, j] = B[i] * B[j]
    return A, B


def legs(layer, params, x, reset=None):
    """Bilinear rule for m' = -A m / t + B u / t at t = 1, 2, ... (arXiv 2008.07669)."""
    size = layer.state_dim
    A, B = _hippo_legs(size)
    identity = np.eye(size)

    def remember(state, u):
        k, m = state[0] + 1, state[1]
        left, right = identity + A / (2 * k), identity - A / (2 * k)
        m = np.stack([np.linalg.solve(left, right @ m[c] + B * u[c] / k) for c in range(len(u))])
        return (k, m), m

    zeros = np.zeros((layer.channels, size))
    return _memory_layer(layer, _f64(params), x, reset, lambda: (0, zeros), remember)


def lssl(layer, params, x, reset=None):
    """Bilinear rule for h' = -A h + B x with a step per channel (arXiv 2110.13985)."""
    p, size = _f64(params), layer.state_dim
    A, B = _hippo_legs(size)
    identity = np.eye(size)

    def step(h, x_t):
        after, z = np.zeros_like(h), []
        for channel, s in enumerate(np.exp(p["log_step"])):
            right = (identity - s / 2 * A) @ h[channel] + s * B * x_t[channel]
            after[channel] = np.linalg.solve(identity + s / 2 * A, right)
            z += [p["C"][channel] @ after[channel] + p["D"][channel] * x_t[channel]]
        return after, _gelu(np.concatenate(z)) @ p["out_proj"] + p["out_bias"]

    return _loop(x, reset, lambda: np.zeros((layer.dim, size)), step)


def block_linear(layer, params, x, reset=None):
    """h = A(x) h + v(x), A in blocks with centered columns of norm 1 at most (arXiv 2309.07412)."""
    p, size = _f64(params), layer.block_size

    def step(h, x_t):
        raw = _relu(x_t @ p["transition_in"]) @ p["transition_out"]
        added = _relu(x_t @ p["input_in"]) @ p["input_out"]
        after = np.zeros_like(h)
        for g, block in enumerate(raw.reshape(-1, size, size)):
            block = block - block.mean(axis=0)
            norms = [np.sum(np.abs(column) ** 1.2) ** (1 / 1.2) for column in block.T]
            rows = slice(g * size, (g + 1) * size)
            after[rows] = block / max(*norms, 1e-30) @ h[rows] + added[rows]
        return after, after

    return _loop(x, reset, lambda: p["initial"], step)


def unitary(layer, params, x, reset=None):
    """h = exp(S(x)) h with skew-symmetric S, from the eigenvalues of i S (arXiv 2208.05719)."""
    p, size = _f64(params), layer.size

    def step(h, x_t):
        after = np.zeros_like(h)
        for head, numbers in enumerate((x_t @ p["skew_proj"]).reshape(len(h), -1)):
            skew, i = np.zeros((size, size)), 0
            for row in range(size):
                for column in range(row):
                    skew[row, column], skew[column, row] = numbers[i], -numbers[i]
                    i += 1
            values, vectors = np.linalg.eigh(1j * skew)
            after[head] = (vectors * np.exp(-1j * values) @ vectors.conj().T).real @ h[head]
        return after, after.reshape(-1) @ p["out_proj"]

    return _loop(x, reset, lambda: p["initial"], step)
