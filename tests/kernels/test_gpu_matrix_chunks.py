"""Mathematics of the GPU kernels of matrix states, in NumPy and float64, without their copies.

The functions that compute a chunk run on arrays in place of memory and registers. This takes
milliseconds, so every form is checked. `test_gpu_matrix` interprets whole kernels.
"""

import itertools
import types

import numpy as np
import pytest

from pallas_kernels.gpu import (
    matrix_blocks,
    matrix_channels,
    matrix_decays,
    matrix_gradients,
    matrix_pairs,
    matrix_pass,
    matrix_state,
)
from pallas_kernels.gpu import matrix_products as mp
from tests.contract.harness import assert_close

INPUTS = ("q", "k", "v", "beta", "a", "b")
C, CHUNKS, K, V, COLUMNS, KEYS = 64, 2, 16, 32, 16, 8
T = C * CHUNKS


class Ref:
    """An array in place of a reference to shared memory."""

    def __init__(self, array):
        self.array = np.array(array, np.float64)

    def __getitem__(self, index):
        return self.array[index]

    def __setitem__(self, index, value):
        self.array[index] = value

    def transpose(self, axes):
        turned = Ref(0)
        turned.array = self.array.transpose(axes)
        return turned


def pieces(array):
    """Return an exact number in the first piece."""
    return [Ref(array), Ref(np.zeros_like(array)), Ref(np.zeros_like(array))]


def joined(parts):
    return sum(part[...] for part in parts)


@pytest.fixture
def on_arrays(monkeypatch):
    """Replace the functions of memory, registers and tensor cores by NumPy's."""

    class Numpy:
        float32 = bfloat16 = np.float64

        def __getattr__(self, name):
            return getattr(np, name)

    def cumsum(x, axis, reverse=False):
        return np.flip(np.flip(x, axis).cumsum(axis), axis) if reverse else x.cumsum(axis)

    def product(num, left, right, add=None, *, in_registers=False):
        return joined(left) @ joined(right) + (0.0 if add is None else add)

    def store(refs, values):
        for ref, value in zip(refs, values, strict=True):
            ref.array = value

    def fori_loop(start, stop, body, value):
        for i in range(start, stop):
            value = body(i, value)
        return value

    functions = {"shift_right_logical": lambda x, n: x >> int(n), "cumsum": cumsum}
    lax = types.SimpleNamespace(**functions, fori_loop=fori_loop)
    modules = (mp, matrix_blocks, matrix_decays, matrix_pairs, matrix_channels, matrix_pass)
    for module in (*modules, matrix_state, matrix_gradients):
        monkeypatch.setattr(module, "jnp", Numpy())
        if hasattr(module, "lax"):
            monkeypatch.setattr(module, "lax", lax)
    for name, function in {
        "product": product,
        "store": store,
        "load": lambda ref: ref[...],
        "zeros": lambda *shape: np.zeros(shape),
        "split": lambda x, n: [x, *[np.zeros_like(x)] * (n - 1)],
        "joined": joined,
        "by_row": lambda ref, shape: np.broadcast_to(ref[...][:, None], shape),
        "by_column": lambda ref, shape: np.broadcast_to(ref[...][None], shape),
        "row_indices": lambda shape: np.broadcast_to(np.arange(shape[0])[:, None], shape),
        "column_indices": lambda shape: np.broadcast_to(np.arange(shape[1]), shape),
    }.items():
        monkeypatch.setattr(mp, name, function)
    monkeypatch.setattr(matrix_pairs, "send", lambda parts, found: found.append(joined(parts)))
    waits = types.SimpleNamespace(wait_smem_to_gmem=lambda n: None, commit_smem=lambda: None)
    for module in (matrix_pairs, matrix_gradients):
        monkeypatch.setattr(module, "plgpu", waits)


def step_by_step(x, p):
    """Return the outputs, the final state, and all cotangents, in loops over time."""
    q, k, v, beta, do, ka, kb = (x[name] for name in ("q", "k", "v", "beta", "d_out", "a", "b"))
    decay = np.exp(x["log_decay"]).reshape(T, -1, 1)
    states, written, out = [x["initial_state"]], [], np.zeros((T, V))
    for t in range(T):
        S = decay[t] * states[-1]
        written.append(beta[t] * (v[t] - S.T @ k[t]) if p.delta else v[t])
        new = S + np.outer(k[t], written[t])
        states.append(new + np.outer(kb[t], states[-1].T @ ka[t]) if p.vectors else new)
        out[t] = p.scale * states[-1].T @ q[t]
    ct = {name: np.zeros_like(x[name]) for name in ("q", "k", "v", "beta", "log_decay", "a", "b")}
    F = x["d_final"]
    for t in reversed(range(T)):
        F = F + p.scale * np.outer(q[t], do[t])
        S, du, read = decay[t] * states[t], F.T @ k[t], np.zeros_like(F)
        ct["q"][t], ct["k"][t] = p.scale * states[t + 1] @ do[t], F @ written[t]
        if p.vectors:
            dz = F.T @ kb[t]
            ct["b"][t], ct["a"][t] = F @ (states[t].T @ ka[t]), states[t] @ dz
            read = np.outer(ka[t], dz)
        if p.delta:
            ct["beta"][t] = (v[t] - S.T @ k[t]) @ du
            du = beta[t] * du
            ct["k"][t] -= S @ du
            F = F - np.outer(k[t], du)
        ct["v"][t] = du
        ct["log_decay"][t] = np.sum(F * S, axis=1 if decay.shape[1] > 1 else None)
        F = decay[t] * F + read
    return out, states[-1], ct | {"initial_state": F}


class Chunks:
    """Blocks of the inputs of all chunks, and of what passes compute."""

    def __init__(self, x, p):
        self.x, self.p = x, p
        self.rows = {name: x[name] for name in matrix_channels.inputs(p)}
        self.values = {name: x[name] for name in ("v", "d_out")}
        self.vectors = {"beta": x["beta"]}
        self.squares = [{} for _ in range(CHUNKS)]
        if p.channel:
            self.rows["logs"] = x["log_decay"]
            logs = x["log_decay"].reshape(CHUNKS, C, K)
            self.carry = np.exp(logs.sum(axis=1))
        if p.decay:
            upto, after = matrix_decays.sums(x["log_decay"][None, None])
            self.vectors |= {"log_decay": x["log_decay"], "upto": upto[0, 0], "after": after[0, 0]}

    def blocks(self, c, columns=slice(None), keys=slice(None)):
        steps = slice(c * C, c * C + C)
        found = {name: pieces(rows[steps, keys]) for name, rows in self.rows.items()}
        found |= {name: pieces(rows[steps, columns]) for name, rows in self.values.items()}
        found |= {name: [Ref(vector[steps])] for name, vector in self.vectors.items()}
        if self.p.channel:
            found["carry"] = [Ref(self.carry[c])]
        return found | {name: pieces(square) for name, square in self.squares[c].items()}

    def store(self, kind, name, c, value, at):
        """Write a result of a chunk into an array [T, ...]."""
        array = kind.setdefault(name, np.zeros((T, V if kind is self.values else K)))
        array[c * C : c * C + C, at] = value


def pairs_of_chunk(chunks, c):
    """Compute scores, the inverse, and the rows with their decays."""
    p, scratch = chunks.p, pieces(np.zeros((C, C)))
    if not p.channel:
        smem = matrix_pairs.SharedMemory(chunks.blocks(c), scratch, pieces(np.zeros((C, C))), None)
        targets = [[], []]
        matrix_pairs._chunk(p, smem, targets)
        names = zip(("scores", "inverse"), targets, strict=True)
        return {name: found[0] for name, found in names if found}
    found = {}
    for right, i in itertools.product(matrix_channels.rights(p), range(0, K, KEYS)):
        at = slice(i, i + KEYS)
        blocks, scratch = chunks.blocks(c, keys=at), pieces(np.zeros((C, KEYS)))
        for name in matrix_channels.row_names(p):
            value = matrix_channels.decayed_row(p, blocks, name)
            chunks.store(chunks.rows, name, c, value, at=at)
        sums = {} if i == 0 else found
        found |= matrix_channels.add_pairs(p, right, blocks, scratch, sums)
    if not p.solved:
        return found
    lower = found.pop("lower")
    lower = mp.by_row(blocks["beta"][0], (C, C)) * lower if p.delta else -lower
    return found | {"inverse": matrix_pairs.inverse(p.num, lower, pieces(np.zeros((C, C))))}


def in_chunks(x, p):
    """Return the same by the functions of the kernels."""
    chunks = Chunks(x, p)
    for c in range(CHUNKS):
        chunks.squares[c] = pairs_of_chunk(chunks, c)
    out, ct = np.zeros((T, V)), {name: np.zeros_like(x[name]) for name in INPUTS}

    def carry(function, state, order, sent=None, kept=None):
        before = {}
        for c in order:
            before[c], after = state, np.zeros_like(state)
            for i in range(0, V, COLUMNS):
                columns = slice(i, i + COLUMNS)
                tile, values = state[:, columns], pieces(np.zeros((C, COLUMNS)))

                def send(value, c=c, columns=columns):
                    sent[c * C : c * C + C, columns] = value

                def keep(value, c=c, columns=columns):
                    chunks.store(chunks.values, kept, c, value, at=columns)

                blocks = chunks.blocks(c, columns)
                chunk = matrix_pass.Chunk(p, blocks, pieces(tile), values, send, keep)
                after[:, columns] = function(chunk, tile)
            state = after
        return before, state

    forward = range(CHUNKS)
    _, final = carry(matrix_state._with_outputs, x["initial_state"], forward, sent=out)
    states, _ = carry(matrix_state._without_outputs, x["initial_state"], forward, kept="written")
    cts, first = carry(
        matrix_state._in_reverse, x["d_final"], forward[::-1], sent=ct["v"], kept="d_right"
    )
    arrays = {}
    results = {name: np.zeros((1, 1, T)) for name in matrix_gradients.VECTORS}
    results |= {"logs": np.zeros((1, T, 1, K)), "carried": np.zeros((1, 1, CHUNKS, K))}
    for c in forward:
        for i in range(0, K, KEYS):
            gradients_of_chunk(chunks, c, slice(i, i + KEYS), states[c], cts[c], ct, results)
    if p.delta:
        right = chunks.values["d_right"]
        ct["beta"] = results["d_beta"][0, 0] + np.sum(right * x["v"], axis=-1)
    if p.channel:
        arrays |= {"carry": [chunks.carry[None, None]]}
        arrays |= {"logs": [x["log_decay"][None, :, None]]}
    if p.decay:
        arrays |= {name: [v[None, None]] for name, v in chunks.vectors.items() if name != "beta"}
    if p.decay or p.channel:
        gradient = matrix_gradients.decay_gradient(p, arrays, results, T)
        ct["log_decay"] = gradient[0, :, 0]
    return out, final, ct | {"initial_state": first}


def gradients_of_chunk(chunks, c, keys, state, cotangent, ct, results):
    p, steps = chunks.p, slice(c * C, c * C + C)
    zeros = np.zeros
    kinds = (
        (matrix_gradients.row_factors(p), zeros((C, KEYS))),
        (matrix_gradients.square_factors(p), zeros((C, C))),
    )
    sums = [dict.fromkeys(factors, zero) for factors, zero in kinds]
    if p.decay or p.channel:
        sums[0]["carried"] = zeros(KEYS)
    for i in range(0, V, COLUMNS):
        columns = slice(i, i + COLUMNS)
        blocks = chunks.blocks(c, columns, keys)
        blocks |= {"states": pieces(state[keys, columns])}
        blocks |= {"cotangents": pieces(cotangent[keys, columns])}
        sums = [
            matrix_gradients.add_tile(p, blocks, factors, found)
            for (factors, _), found in zip(kinds, sums, strict=True)
        ]
    size = KEYS if p.channel else C
    scratch = [pieces(zeros((C, size))), pieces(zeros((C, C)))]
    blocks, stored = (
        chunks.blocks(c, keys=keys),
        {pair.name: Ref(zeros((C, C))) for pair in p.pairs},
    )
    found = matrix_gradients.of_rows(p, blocks, scratch, sums[0])
    matrix_gradients.store_squares(p, stored, sums[1])
    found = matrix_gradients.of_pairs(p, blocks, scratch, stored, found)
    for name, value in found.items():
        if name in matrix_gradients.VECTORS:
            results[name][0, 0, steps] += value
        elif name == "carried":
            results[name][0, 0, c, keys] = value
        elif name == "logs":
            results[name][0, steps, 0, keys] = value
        else:
            ct[name][steps, keys] = value


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("op", ["linear attention", "delta rule", "generalized delta rule"])
@pytest.mark.parametrize("same_keys", [False, True], ids=["random keys", "same keys"])
def test_chunks_are_the_recurrence(op, decay, same_keys, on_arrays):
    """Check values and cotangents, with decays of zero, as at resets, inside chunks."""
    if op == "generalized delta rule" and decay != "channel":
        pytest.skip("the kernels repeat these decays over channels")
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((T, K)) for name in "qkab"}
    x |= {name: x[name] / np.linalg.norm(x[name], axis=-1, keepdims=True) for name in "ab"}
    x["k"] = np.full((T, K), 0.25) if same_keys else x["k"] / K**0.5
    x |= {name: rng.standard_normal((T, V)) for name in ("v", "d_out")}
    x |= {name: rng.standard_normal((K, V)) for name in ("initial_state", "d_final")}
    x["beta"] = np.ones(T) if same_keys else rng.uniform(0, 2, T)
    x["log_decay"] = -rng.uniform(0, 0.5, (T, K) if decay == "channel" else T)
    x["log_decay"][[10, 11, 100]] = matrix_pairs.LOG_ZERO
    if decay is None:
        x["log_decay"] = np.zeros(T)
    num = mp.Numerics(3, 3, 128, interpret=True)
    forms = {"decay": decay == "head", "channel": decay == "channel"}
    forms |= {"delta": op == "delta rule", "vectors": op == "generalized delta rule"}
    p = matrix_blocks.Variant(num, 1, K, COLUMNS, CHUNKS, K**-0.5, **forms)
    expected, found = step_by_step(x, p), in_chunks(x, p)
    unused = [*([] if p.delta else ["beta"]), *([] if decay else ["log_decay"])]
    unused += [] if p.vectors else ["a", "b"]
    for name in unused:
        expected[2].pop(name)
        found[2].pop(name, None)
    assert_close(found, expected, 1e-12)
