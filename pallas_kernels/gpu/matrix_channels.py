"""Decays per channel in a chunk, for the matrix-state kernels on GPU.

For every t and j < t there is one block of 2, 4, ... or 64 steps with j in its first and t in its
second half. The decays from j to t factorize at the middle of this block:

    D_{t,j} = E_t E_j        E_t: decays of the steps from the middle on, up to t
                             E_j: decays of the steps after j, before the middle

So the pairs of all blocks of a size, a level, are one product. No exponent is a difference of sums.
The first pass computes what `matrix_pairs` does, and the rows with their decays in the chunk:

    q_read_t = D_{t,0} q_t      k_read_t = D_{t,0} k_t      k_write_j = D_{C,j} k_j

Channels are independent in all results but the sums over them. A thread block has one chunk of one
head, and adds tiles of 64 channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import KEY_TILE, Arrays, Blocks, Position, Variant
from pallas_kernels.gpu.matrix_pairs import LEVELS, SQUARE, inverse, joins, send
from pallas_kernels.gpu.matrix_products import CHUNK, Pieces
from pallas_kernels.jax_compat import array_like, pl


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      given: blocks of the inputs of a tile, by name.
      scratch: pieces of a matrix, for right factors and results.
      barrier: completed when the inputs have arrived.
    """

    given: Blocks
    scratch: list[Any]
    barrier: Any


class Decays:
    """Decays of a tile of channels in a chunk, from pieces of their logarithms in shared memory."""

    def __init__(self, p: Variant, logs: Pieces) -> None:
        self.num = p.num
        self.logs = logs

    def _of(self, steps: jax.Array) -> jax.Array:
        """Return the decays of the steps, a mask [64, 64] with a row for each result."""
        sums = mp.product(self.num, [mp.ones(steps)], self.logs, in_registers=True)
        return jnp.exp(sums)

    def level(self, level: Any) -> jax.Array:
        """Return E of a level, [64, keys]."""
        return self._of(steps_of_level(*_rows_and_columns(), level))

    def upto(self) -> jax.Array:
        """Return the decays up to a step, [64, keys]."""
        t, i = _rows_and_columns()
        return self._of(i <= t)

    def after(self) -> jax.Array:
        """Return the decays after a step, [64, keys]."""
        t, i = _rows_and_columns()
        return self._of(i > t)


def _rows_and_columns() -> tuple[jax.Array, jax.Array]:
    return mp.row_indices(SQUARE), mp.column_indices(SQUARE)


def steps_of_level(t: jax.Array, i: jax.Array, level: Any) -> jax.Array:
    """Return whether the decay of step i is in E_t of a level."""
    level = jnp.int32(level)
    block, own = lax.shift_right_logical(i, level), lax.shift_right_logical(t, level)
    second = (own & 1) != 0
    return (block == own) & ((second & (i <= t)) | (((own & 1) == 0) & (i > t)))


def channels(p: Variant, arrays: Arrays, shape: tuple[int, ...]) -> Arrays:
    """Compute "scores", "q_read", "k_write", and for the delta rule "inverse" and "k_read".

    Args:
      p: the variant.
      arrays: "q", "k", "logs", and for the delta rule "beta". The logarithms are finite.
      shape: B and H.
    """
    names = ("q", "k", "logs", *(("beta",) if p.delta else ()))
    leaves, tree = jax.tree.flatten({name: arrays[name] for name in names})
    squares, rows = {"scores": p.computed}, {"q_read": p.num.inputs, "k_write": p.computed}
    if p.delta:
        squares["inverse"] = rows["k_read"] = p.computed
    lead = (*shape, p.chunks)
    outputs = {
        name: array_like(leaves[0], (*lead, count, CHUNK, columns), jnp.bfloat16)
        for counts, columns in ((squares, CHUNK), (rows, p.keys))
        for name, count in counts.items()
    }
    of_tile = p._replace(keys=KEY_TILE)

    def body(*refs: Any, smem: SharedMemory) -> None:
        batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        found = zip(outputs, refs[len(leaves) :], strict=True)
        targets = {name: ref.at[batch, head, chunk] for name, ref in found}

        def store(name: str, pieces: list[jax.Array], keys: Any = slice(None)) -> None:
            refs = smem.scratch[: len(pieces)]
            mp.store(refs, pieces)
            send(refs, targets[name].at[:, :, keys])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        sums: Any = None
        for start in range(0, p.keys, KEY_TILE):
            keys = pl.ds(start, KEY_TILE)
            at = Position(batch, head, chunk, columns=None, keys=keys)
            if start:
                plgpu.commit_smem()  # all threads have read the blocks
            for name, block in smem.given.items():
                matrix_blocks.fetch(of_tile, name, sources[name], at, block, smem.barrier)
            plgpu.barrier_wait(smem.barrier)
            for name, value in decayed_rows(p, smem.given).items():
                store(name, mp.split(value, rows[name]), keys)
            sums = add_pairs(p, smem.given, smem.scratch, sums)
        scores, overlaps = sums
        store("scores", mp.split(scores, p.computed))
        if p.delta:
            lower = mp.by_row(smem.given["beta"][0], SQUARE) * overlaps
            found = inverse(p.num, lower, smem.scratch[: p.num.exact])
            store("inverse", mp.split(found, p.computed))
        plgpu.wait_smem_to_gmem(0)

    given = {
        name: matrix_blocks.buffers(of_tile, name, matrix_blocks.pieces(name, arrays[name]))
        for name in names
    }
    smem = SharedMemory(
        given=given,
        scratch=matrix_blocks.buffers(of_tile, "scores", p.num.exact),
        barrier=plgpu.Barrier(num_arrivals=sum(map(len, given.values()))),
    )
    grid = {"chunk": p.chunks, "head": shape[1], "batch": shape[0]}
    interpret = p.num.interpret
    found = matrix_blocks.launch("matrix_channels", body, leaves, outputs, smem, grid, interpret)
    return {name: [x] for name, x in found.items()}


def decayed_rows(p: Variant, blocks: Blocks) -> dict[str, jax.Array]:
    """Return the rows of a tile with their decays in the chunk, by name."""
    decays = Decays(p, blocks["logs"])
    k, upto = mp.joined(blocks["k"]), decays.upto()
    rows = {"q_read": upto * mp.joined(blocks["q"])}
    if p.delta:
        rows["k_read"] = upto * k
    return rows | {"k_write": decays.after() * k}


def add_pairs(p: Variant, blocks: Blocks, scratch: list[Any], sums: Any) -> tuple[Any, Any]:
    """Add the products of pairs of steps in a tile.

    Args:
      p: the variant.
      blocks: "q", "k" and "logs" of the tile.
      scratch: shared memory for the exact pieces of a matrix.
      sums: the result of the previous tile, or None.

    Returns:
      scores q_t^T D_{t,j} k_j for j <= t, and for the delta rule k_t^T D_{t,j} k_j for j < t.
    """
    num = p.num
    decays = Decays(p, blocks["logs"])
    t, j = _rows_and_columns()
    same_step = mp.product(num, blocks["q"], mp.transposed(blocks["k"]))
    if sums is None:
        sums = mp.zeros(*SQUARE), mp.zeros(*SQUARE) if p.delta else None

    def add_level(level: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        scores, overlaps = sums
        decay, mask = decays.level(level), joins(t, j, level)
        early = mp.split(decay * mp.joined(blocks["k"]), num.exact)
        mp.store(scratch, early)
        if p.delta:
            found = mp.product(num, early, mp.transposed(scratch), in_registers=True)
            overlaps = overlaps + jnp.where(mask, found, 0.0)
        late = mp.split(decay * mp.joined(blocks["q"]), num.exact)
        found = mp.product(num, late, mp.transposed(scratch), in_registers=True)
        scores = scores + jnp.where(mask, found, 0.0)
        return scores, overlaps

    sums = sums[0] + jnp.where(t == j, same_step, 0.0), sums[1]
    return lax.fori_loop(0, LEVELS, add_level, sums)


class PairCotangents(NamedTuple):
    """Cotangents of a tile.

    Attributes:
      q, k: [64, keys].
      logs: cotangents of the logarithms of decays, [64, keys].
      beta: [64], or None without the delta rule.
    """

    q: jax.Array
    k: jax.Array
    logs: jax.Array
    beta: Any


def pairs_back(
    p: Variant,
    blocks: Blocks,
    scratch: list[list[Any]],
    squares: list[Any],
    sums: PairCotangents,
) -> PairCotangents:
    """Add the terms of pairs of steps to cotangents.

    Args:
      p: the variant.
      blocks: "q", "k", "logs", and for the delta rule "beta".
      scratch: shared memory for the exact pieces of two matrices.
      squares: cotangents of the scores, zero for j > t, and for the delta rule of N, the overlaps
        times beta.
      sums: the other terms of the cotangents.
    """
    num, [first, second] = p.num, scratch

    def product(left: Pieces, right: Pieces, add: Any = None) -> jax.Array:
        return mp.product(num, left, right, add, in_registers=True)

    decays = Decays(p, blocks["logs"])
    t, j = _rows_and_columns()
    ends = mp.split(jnp.where(t == j, mp.load(squares[0]), 0.0), num.exact)
    mp.store(first, ends)
    dk = mp.product(num, mp.transposed(first), blocks["q"], sums.k)
    sums = sums._replace(q=product(ends, blocks["k"], sums.q), k=dk)
    beta = (lambda x: mp.by_row(blocks["beta"][0], x.shape) * x) if p.delta else None

    # Short lives of values, because the sums take half of the registers: factors are read again.
    def add_level(level: Any, sums: PairCotangents) -> PairCotangents:
        decay, mask = decays.level(level), joins(t, j, level)

        def masked(square: int) -> jax.Array:
            return jnp.where(mask, mp.load(squares[square]), 0.0)

        def row(name: str) -> jax.Array:
            return decay * mp.joined(blocks[name])

        mp.store(first, mp.split(row("k"), num.exact))
        by_query = product(mp.split(masked(0), num.exact), first)
        dq, change = sums.q + decay * by_query, row("q") * by_query
        by_key, d_beta = None, None
        if beta is not None:
            by_key = product(mp.split(masked(1), num.exact), first)
            d_beta = sums.beta + jnp.sum(row("k") * by_key, axis=1)
            mp.store(second, mp.split(beta(masked(1)), num.exact))
            by_key = mp.product(num, mp.transposed(second), first, beta(by_key))
        mp.store(second, mp.split(masked(0), num.exact))
        mp.store(first, mp.split(row("q"), num.exact))
        by_key = mp.product(num, mp.transposed(second), first, by_key)
        change = change + row("k") * by_key
        mp.store(first, mp.split(change, num.exact))
        logs = product([mp.ones(steps_of_level(j, t, level))], first, sums.logs)
        return PairCotangents(dq, sums.k + decay * by_key, logs, d_beta)

    return lax.fori_loop(0, LEVELS, add_level, sums)
