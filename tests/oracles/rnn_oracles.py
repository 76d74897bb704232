"""RNN cells and their layers as float64 NumPy loops, written from the papers' equations.

The layers' functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Each
rests on one step `(hyper, p, state, u)`: `state` is a list of vectors [N], `u` [gates, N], and
`hyper` anything with the cell's hyperparameters. Nothing here comes from seqjax.
"""

import functools

import numpy as np


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _full(weight):
    """Return the block-diagonal matrix of heads [H, n, n]; other weights unchanged."""
    if weight.ndim < 3:
        return weight
    heads, n, _ = weight.shape
    full = np.zeros((heads * n, heads * n))
    for h in range(heads):
        full[h * n : (h + 1) * n, h * n : (h + 1) * n] = weight[h]
    return full


def elman_step(hyper, p, state, u):
    (h,) = state
    return [np.tanh(u[0] + h @ p["W"])]


def gru_step(hyper, p, state, u):
    (h,) = state
    reset_gate = _sigmoid(u[0] + h @ p["W_r"])
    update = _sigmoid(u[1] + h @ p["W_z"])
    new = np.tanh(u[2] + reset_gate * (h @ p["W_n"] + p["n_bias"]))
    return [(1 - update) * new + update * h]


def normalize(z, heads, eps):
    """Normalize z [gates, N] over the gates and the channels of each head."""
    parts = [
        (part - part.mean()) / np.sqrt(part.var() + eps) for part in np.split(z, heads or 1, axis=1)
    ]
    return np.concatenate(parts, axis=1)


def lstm_step(hyper, p, state, u):
    c, h, *gates = state
    missing = {"nig": "i", "nfg": "f", "cifg": "f", "nog": "o"}.get(hyper.variant)
    names = [name for name in "ifgo" if name != missing]
    heads = getattr(hyper, "heads", None)
    products = np.stack([h @ p[f"W_{name}"] for name in names])
    if hyper.layer_norm:
        scales = np.stack([p[f"S_{name}"] for name in names])
        products = scales * normalize(products, heads, hyper.norm_eps)
    rows = dict(zip(names, u + products, strict=True))

    def gate(name, c):
        if name == missing:
            return np.ones_like(c)
        before = rows[name]
        if hyper.variant == "fgr":
            before = before + sum(
                value @ p[f"W_{old}{name}"] for old, value in zip("ifo", gates, strict=True)
            )
        return _sigmoid(before + (p[f"P_{name}"] * c if hyper.peepholes else 0))

    i = gate("i", c)
    f = 1 - i if hyper.variant == "cifg" else gate("f", c)
    g = rows["g"]
    c = f * c + i * (g if hyper.variant == "niaf" else np.tanh(g))
    o = gate("o", c)
    read = c
    if hyper.layer_norm:
        read = p["S_c"] * normalize(c[None], heads, hyper.norm_eps)[0] + p["b_c"]
    h = o * (read if hyper.variant == "noaf" else np.tanh(read))
    return [c, h, i, f, o] if hyper.variant == "fgr" else [c, h]


def paragru_step(hyper, p, state, u):
    (h,) = state
    z = _sigmoid(p["A_z"] * h + u[0])
    r = _sigmoid(p["A_r"] * h + u[1])
    n = np.tanh(p["A_n"] * (h * r) + u[2])
    return [(1 - z) * h + z * n]


def paralstm_step(hyper, p, state, u):
    c, h = state
    f = _sigmoid(p["A_f"] * h + u[0] + p["C_f"] * c)
    c = f * c + (1 - f) * np.tanh(p["A_g"] * h + u[1])
    o = _sigmoid(p["A_o"] * h + u[2] + p["C_o"] * c)
    return [c, o * np.tanh(c)]


def slstm_step(hyper, p, state, u):
    """Compute the sums without a stabilizer; the state is (c, n, h)."""
    c, n, h = state
    from_h = {name: h @ R if R.ndim == 2 else R * h for name, R in p.items() if name[0] == "R"}
    i = np.exp(u[0] + from_h["R_i"])
    f = _sigmoid(u[1] + from_h["R_f"])
    z = np.tanh(u[2] + from_h["R_z"])
    o = _sigmoid(u[3] + from_h["R_o"])
    c, n = f * c + i * z, f * n + i
    return [c, n, o * c / n]


def lem_step(hyper, p, state, u):
    y, z = state
    step_z = hyper.dt * _sigmoid(u[0] + y @ p["W_1"])
    step_y = hyper.dt * _sigmoid(u[1] + y @ p["W_2"])
    z = (1 - step_z) * z + step_z * np.tanh(u[2] + y @ p["W_z"])
    y = (1 - step_y) * y + step_y * np.tanh(u[3] + z @ p["W_y"])
    return [y, z]


def ltc_step(hyper, p, state, u):
    (h,) = state
    f = _sigmoid(u[0] + h @ p["W"])
    tau = np.exp(p["log_tau"])
    return [(h + hyper.dt * f * p["A"]) / (1 + hyper.dt * (1 / tau + f))]


def indrnn_step(hyper, p, state, u):
    (h,) = state
    before = u[0] + p["w"] * h
    return [np.maximum(before, 0) if hyper.activation == "relu" else np.tanh(before)]


def mgu_step(hyper, p, state, u):
    (h,) = state
    f = _sigmoid(u[0] + h @ p["W_f"])
    return [(1 - f) * h + f * np.tanh(u[1] + (f * h) @ p["W_n"])]


def plrnn_step(hyper, p, state, u):
    (h,) = state
    return [p["a"] * h + np.maximum(h, 0) @ p["W"] + u[0]]


def leakyrnn_step(hyper, p, state, u):
    (h,) = state
    a = np.exp(-1 / np.exp(p["log_tau"]))
    return [a * h + (1 - a) * np.tanh(u[0] + h @ p["W"])]


def cornn_step(hyper, p, state, u):
    y, z = state
    force = np.tanh(u[0] + y @ p["W_y"] + z @ p["W_z"])
    z = z + hyper.dt * (force - hyper.gamma * y - hyper.epsilon * z)
    return [y + hyper.dt * z, z]


def unicornn_step(hyper, p, state, u):
    y, z = state
    s = hyper.dt * _sigmoid(p["c"])
    z = z - s * (np.tanh(u[0] + p["w"] * y) + hyper.alpha * y)
    return [y + s * z, z]


def sru_step(hyper, p, state, u):
    (c,) = state
    f = _sigmoid(u[1] + p["v_f"] * c)
    return [f * c + (1 - f) * u[0]]


# By class name: the step, how many vectors its state has, and which of them a layer reads.
STEPS = {
    "Elman": (elman_step, 1, 0),
    "GRU": (gru_step, 1, 0),
    "LSTM": (lstm_step, 2, 1),
    "ParaGRU": (paragru_step, 1, 0),
    "ParaLSTM": (paralstm_step, 2, 1),
    "SLSTM": (slstm_step, 3, 2),
    "DenseSLSTM": (slstm_step, 3, 2),
    "LEM": (lem_step, 2, 0),
    "LTC": (ltc_step, 1, 0),
    "IndRNN": (indrnn_step, 1, 0),
    "MGU": (mgu_step, 1, 0),
    "PLRNN": (plrnn_step, 1, 0),
    "LeakyRNN": (leakyrnn_step, 1, 0),
    "CoRNN": (cornn_step, 2, 0),
    "UnICORNN": (unicornn_step, 2, 0),
    "SRU": (sru_step, 1, 0),
}


def _loop(name, layer, params, x, reset=None):
    step, width, read = STEPS[name]
    width = 5 if getattr(layer, "variant", None) == "fgr" else width
    p = {key: _full(np.asarray(value, np.float64)) for key, value in params.items()}
    x = np.asarray(x, np.float64)
    batch, length, _ = x.shape
    reset = np.zeros((batch, length), bool) if reset is None else np.asarray(reset, bool)
    size = layer.states
    y = np.zeros_like(x)
    for b in range(batch):
        state = [np.zeros(size)] * width
        for t in range(length):
            if reset[b, t]:
                state = [np.zeros(size)] * width
            u = (x[b, t] @ p["in_proj"]).reshape(-1, size)
            if "in_scale" in p:
                u = p["in_scale"].reshape(-1, size) * normalize(u, layer.heads, layer.norm_eps)
            u = u + p["bias"].reshape(-1, size)
            state = step(layer, p, state, u)
            y[b, t] = state[read] @ p["out_proj"]
    return y


(
    elman,
    gru,
    lstm,
    paragru,
    paralstm,
    slstm,
    lem,
    ltc,
    indrnn,
    mgu,
    plrnn,
    leakyrnn,
    cornn,
    unicornn,
) = (functools.partial(_loop, name) for name in STEPS if name not in ("DenseSLSTM", "SRU"))


def nonlinear_scan(cell, inputs, state, reset):
    """Run the cell over its pre-activations; return (states, last state), as the op does."""
    step, count, _ = STEPS[type(cell).__name__]
    x = inputs["x"]
    states = np.zeros((*x.shape[:2], *state.shape[1:]))
    h = state.copy()
    for b, t in np.ndindex(x.shape[:2]):
        found = np.zeros_like(h[b]) if reset[b, t] else h[b]
        parts = [found] if count == 1 else list(found.T)
        new = step(cell, inputs["params"], parts, x[b, t])
        h[b] = new[0] if count == 1 else np.stack(new, axis=-1)
        states[b, t] = h[b]
    return states, h
