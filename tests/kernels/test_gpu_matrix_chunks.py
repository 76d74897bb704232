"""Mathematics of the GPU kernels of matrix states, in NumPy and float64, without their copies.

The functions that compute a chunk run on arrays in place of memory and registers. This takes
milliseconds, so every form is checked. `test_gpu_matrix` interprets whole kernels.
"""

import types

import numpy as np
import pytest

from pallas_kernels.gpu import (
    matrix_blocks,
    matrix_channels,
    matrix_gradients,
    matrix_pairs,
    matrix_pass,
    matrix_state,
)
from pallas_kernels.gpu import matrix_products as mp
from tests.contract.harness import assert_close

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
    modules = (mp, matrix_blocks, matrix_pairs, matrix_channels, matrix_pass)
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


def step_by_step(x, delta, scale):
    """Return the outputs, the final state, and all cotangents, in loops over time."""
    q, k, v, beta, do = (x[name] for name in ("q", "k", "v", "beta", "d_out"))
    a = np.exp(x["log_decay"]).reshape(T, -1, 1)
    states, written, out = [x["initial_state"]], [], np.zeros((T, V))
    for t in range(T):
        S = a[t] * states[-1]
        written.append(beta[t] * (v[t] - S.T @ k[t]) if delta else v[t])
        states.append(S + np.outer(k[t], written[t]))
        out[t] = scale * states[-1].T @ q[t]
    ct = {name: np.zeros_like(x[name]) for name in ("q", "k", "v", "beta", "log_decay")}
    F = x["d_final"]
    for t in reversed(range(T)):
        F = F + scale * np.outer(q[t], do[t])
        S, du = a[t] * states[t], F.T @ k[t]
        ct["q"][t], ct["k"][t] = scale * states[t + 1] @ do[t], F @ written[t]
        if delta:
            ct["beta"][t] = (v[t] - S.T @ k[t]) @ du
            du = beta[t] * du
            ct["k"][t] -= S @ du
            F = F - np.outer(k[t], du)
        ct["v"][t] = du
        ct["log_decay"][t] = np.sum(F * S, axis=1 if a.shape[1] > 1 else None)
        F = a[t] * F
    return out, states[-1], ct | {"initial_state": F}


class Chunks:
    """Blocks of the inputs of all chunks, and of what passes compute."""

    def __init__(self, x, p):
        self.x, self.p = x, p
        self.rows = {name: x[name] for name in "qk"}
        self.values = {name: x[name] for name in ("v", "d_out")}
        self.vectors = {"beta": x["beta"]}
        self.squares = [{} for _ in range(CHUNKS)]
        if p.channel:
            self.rows["logs"] = x["log_decay"]
            logs = x["log_decay"].reshape(CHUNKS, C, K)
            self.carry = np.exp(logs.sum(axis=1))
        if p.decay:
            upto, after = matrix_state._sums(x["log_decay"][None, None])
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
    sums = None
    for i in range(0, K, KEYS):
        at = slice(i, i + KEYS)
        blocks, scratch = chunks.blocks(c, keys=at), pieces(np.zeros((C, KEYS)))
        for name, value in matrix_channels.decayed_rows(p, blocks).items():
            chunks.store(chunks.rows, name, c, value, at=at)
        sums = matrix_channels.add_pairs(p, blocks, scratch, sums)
    scores, overlaps = sums
    if not p.delta:
        return {"scores": scores}
    lower = mp.by_row(blocks["beta"][0], (C, C)) * overlaps
    scratch = pieces(np.zeros((C, C)))
    return {"scores": scores, "inverse": matrix_pairs.inverse(p.num, lower, scratch)}


def in_chunks(x, p):
    """Return the same by the functions of the kernels."""
    chunks = Chunks(x, p)
    for c in range(CHUNKS):
        chunks.squares[c] = pairs_of_chunk(chunks, c)
    out, ct = np.zeros((T, V)), {name: np.zeros_like(x[name]) for name in ("q", "k", "v", "beta")}

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
    arrays = {
        name: [np.stack([by_chunk[c] for c in forward])[None, None, :, None]]
        for name, by_chunk in (("states", states), ("cotangents", cts))
    }
    results = {name: np.zeros((1, 1, T)) for name in matrix_gradients.VECTORS}
    results["logs"] = np.zeros((1, T, 1, K))
    for c in forward:
        for i in range(0, K, KEYS):
            gradients_of_chunk(chunks, c, slice(i, i + KEYS), states[c], cts[c], ct, results)
    if p.delta:
        right = chunks.values["d_right"]
        ct["v"] = x["beta"][:, None] * right
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
    rows = matrix_gradients.Rows(*[zeros((C, KEYS))] * 3)
    squares = matrix_gradients.Squares(*[zeros((C, C))] * 2)
    for i in range(0, V, COLUMNS):
        columns = slice(i, i + COLUMNS)
        blocks = chunks.blocks(c, columns, keys)
        blocks |= {"states": pieces(state[keys, columns])}
        blocks |= {"cotangents": pieces(cotangent[keys, columns])}
        rows, squares = (matrix_gradients.add_tile(p, blocks, sums) for sums in (rows, squares))
    size = KEYS if p.channel else C
    scratch = [pieces(zeros((C, size))), pieces(zeros((C, C)))]
    blocks, stored = chunks.blocks(c, keys=keys), [Ref(zeros((C, C))) for _ in range(2)]
    found = matrix_gradients.of_rows(p, blocks, scratch, rows)
    matrix_gradients.store_squares(p, stored, squares)
    found = matrix_gradients.of_pairs(p, blocks, scratch, stored, found)
    for name, value in found.items():
        if name in matrix_gradients.VECTORS:
            results[name][0, 0, steps] += value
        elif name == "logs":
            results[name][0, steps, 0, keys] = value
        else:
            ct[name][steps, keys] = value


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["linear attention", "delta rule"])
@pytest.mark.parametrize("same_keys", [False, True], ids=["random keys", "same keys"])
def test_chunks_are_the_recurrence(delta, decay, same_keys, on_arrays):
    """Check values and cotangents, with decays of zero, as at resets, inside chunks."""
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((T, K)) for name in "qk"}
    x["k"] = np.full((T, K), 0.25) if same_keys else x["k"] / K**0.5
    x |= {name: rng.standard_normal((T, V)) for name in ("v", "d_out")}
    x |= {name: rng.standard_normal((K, V)) for name in ("initial_state", "d_final")}
    x["beta"] = np.ones(T) if same_keys else rng.uniform(0, 2, T)
    x["log_decay"] = -rng.uniform(0, 0.5, (T, K) if decay == "channel" else T)
    x["log_decay"][[10, 11, 100]] = matrix_pairs.LOG_ZERO
    if decay is None:
        x["log_decay"] = np.zeros(T)
    num = mp.Numerics(3, 3, 128, interpret=True)
    forms = {"decay": decay == "head", "channel": decay == "channel", "delta": delta}
    p = matrix_blocks.Variant(num, 1, K, COLUMNS, CHUNKS, K**-0.5, **forms)
    expected, found = step_by_step(x, delta, K**-0.5), in_chunks(x, p)
    unused = [*([] if delta else ["beta"]), *([] if decay else ["log_decay"])]
    for name in unused:
        expected[2].pop(name)
        found[2].pop(name, None)
    assert_close(found, expected, 1e-12)
