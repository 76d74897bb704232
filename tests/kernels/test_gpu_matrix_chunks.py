"""Mathematics of the GPU kernels of matrix states, in NumPy and float64, without their copies.

The functions that compute a chunk run on arrays in place of memory and registers. This takes
milliseconds, so every form is checked. `test_gpu_matrix` interprets whole kernels.
"""

import types

import numpy as np
import pytest

from pallas_kernels.gpu import (
    matrix_blocks,
    matrix_gradients,
    matrix_pairs,
    matrix_pass,
    matrix_state,
)
from pallas_kernels.gpu import matrix_products as mp
from tests.contract.harness import assert_close

C, CHUNKS, K, V, COLUMNS = 64, 2, 16, 32, 16
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

    def product(num, left, right, add=0.0, *, in_registers=False):
        return add + joined(left) @ joined(right)

    def store(refs, values):
        for ref, value in zip(refs, values, strict=True):
            ref[...] = value

    lax = types.SimpleNamespace(shift_right_logical=lambda x, n: x >> int(n), cumsum=cumsum)
    for module in (mp, matrix_pairs, matrix_pass, matrix_state, matrix_gradients):
        monkeypatch.setattr(module, "jnp", Numpy())
        if hasattr(module, "lax"):
            monkeypatch.setattr(module, "lax", lax)
    for name, function in {
        "product": product,
        "store": store,
        "split": lambda x, n: [x, *[np.zeros_like(x)] * (n - 1)],
        "joined": joined,
        "by_row": lambda ref, shape: np.broadcast_to(ref[...][:, None], shape),
        "by_column": lambda ref, shape: np.broadcast_to(ref[...][None], shape),
        "row_indices": lambda shape: np.broadcast_to(np.arange(shape[0])[:, None], shape),
        "column_indices": lambda shape: np.broadcast_to(np.arange(shape[1]), shape),
    }.items():
        monkeypatch.setattr(mp, name, function)
    monkeypatch.setattr(matrix_pairs, "_send", lambda parts, found: found.append(joined(parts)))
    waits = types.SimpleNamespace(wait_smem_to_gmem=lambda n: None)
    monkeypatch.setattr(matrix_pairs, "plgpu", waits)


def step_by_step(x, decay, delta, scale):
    """Return the outputs, the final state, and all cotangents, in loops over time."""
    q, k, v, beta, g, do = (x[name] for name in ("q", "k", "v", "beta", "log_decay", "d_out"))
    a = np.exp(g) if decay else np.ones(T)
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
        ct["v"][t], ct["log_decay"][t] = du, np.sum(F * S)
        F = a[t] * F
    return out, states[-1], ct | {"initial_state": F}


def in_chunks(x, p):
    """Return the same by the functions of the kernels."""
    arrays = {"log_decay": [x["log_decay"][None, None]]}
    upto, after = (s[0, 0] for s in matrix_state._sums(arrays["log_decay"][0]))
    vectors = {"log_decay": x["log_decay"], "beta": x["beta"], "upto": upto, "after": after}

    def blocks(c, columns=slice(None)):
        steps = slice(c * C, c * C + C)
        found = {name: pieces(x[name][steps]) for name in "qk"}
        found |= {name: pieces(x[name][steps, columns]) for name in ("v", "d_out")}
        found |= {name: [Ref(vector[steps])] for name, vector in vectors.items()}
        return found | {name: pieces(square) for name, square in squares[c].items()}

    squares = [{} for _ in range(CHUNKS)]
    for c in range(CHUNKS):
        smem = matrix_pairs.SharedMemory(
            blocks(c), pieces(np.zeros((C, C))), pieces(np.zeros((C, C))), None
        )
        targets = [[], []]
        matrix_pairs._chunk(p, smem, targets)
        squares[c] = {
            name: found[0]
            for name, found in zip(("scores", "inverse"), targets, strict=True)
            if found
        }

    def carry(function, state, chunks):
        before = {}
        for c in chunks:
            before[c], after = state, np.zeros_like(state)
            for i in range(0, V, COLUMNS):
                columns, found = slice(i, i + COLUMNS), []
                tile, values = state[:, columns], pieces(np.zeros((C, COLUMNS)))
                x_of_chunk = blocks(c, columns)
                chunk = matrix_pass.Chunk(p, x_of_chunk, pieces(tile), values, found.append)
                after[:, columns] = function(chunk, tile)
                if found:
                    out[c * C : c * C + C, columns] = found[0]
            state = after
        return before, state

    out = np.zeros((T, V))
    states, final = carry(matrix_state._with_outputs, x["initial_state"], range(CHUNKS))
    cts, first = carry(matrix_state._in_reverse, x["d_final"], reversed(range(CHUNKS)))
    ct = {name: np.zeros_like(x[name]) for name in ("q", "k", "v", "beta")}
    sums = {name: np.zeros((1, 1, T)) for name in ("d_reads", "d_writes", "d_spans")}
    for c in range(CHUNKS):
        steps, zeros = slice(c * C, c * C + C), np.zeros
        total = matrix_gradients.Sums(
            zeros((C, K)), zeros((C, K)), zeros((C, C)), zeros((C, C)), *[zeros(C)] * 3
        )
        for i in range(0, V, COLUMNS):
            columns = slice(i, i + COLUMNS)
            loaded = blocks(c, columns)
            tile = {"states": pieces(states[c][:, columns])}
            tile |= {"cotangents": pieces(cts[c][:, columns])}
            total, dv = matrix_gradients._tile(p, loaded | tile, loaded, total)
            ct["v"][steps, columns] = dv
        total, spans = matrix_gradients._pairs(p, blocks(c), blocks(c), total)
        ct["q"][steps], ct["k"][steps], ct["beta"][steps] = total.dq, total.dk, total.beta
        if p.decay:
            for name, value in zip(sums, (total.reads, total.writes, spans), strict=True):
                sums[name][0, 0, steps] = value
    if p.decay:
        for name, by_chunk in (("states", states), ("cotangents", cts)):
            arrays[name] = [np.stack([by_chunk[c] for c in range(CHUNKS)])[None, None, :, None]]
        arrays["upto"] = [upto[None, None]]
        ct["log_decay"] = matrix_state._decay_gradient(arrays, sums)[0, 0]
    return out, final, ct | {"initial_state": first}


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
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
    x["log_decay"] = -rng.uniform(0, 0.5, T)
    x["log_decay"][[10, 11, 100]] = matrix_pairs.LOG_ZERO
    num = mp.Numerics(3, 3, 128, interpret=True)
    p = matrix_blocks.Variant(num, 1, K, COLUMNS, CHUNKS, K**-0.5, decay, delta)
    expected, found = step_by_step(x, decay, delta, K**-0.5), in_chunks(x, p)
    unused = [*([] if delta else ["beta"]), *([] if decay else ["log_decay"])]
    for name in unused:
        expected[2].pop(name)
        found[2].pop(name, None)
    assert_close(found, expected, 1e-12)
