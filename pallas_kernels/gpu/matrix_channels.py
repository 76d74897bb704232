"""Decays per channel in a chunk, for the matrix-state kernels on GPU.

For every t and j < t there is one block of 2, 4, ... or 64 steps with j in its first and t in its
second half. The decays from j to t factorize at the middle of this block:

    D_{t,j} = E_t E_j        E_t: decays of the steps from the middle on, up to t
                             E_j: decays of the steps after j, before the middle

So the pairs of all blocks of a size, a level, are one product. No exponent is a difference of sums.
The first pass computes what `matrix_pairs` does, and the rows with their decays in the chunk:

    q_read_t = D_{t,0} q_t      k_read_t = D_{t,0} k_t      a_read_t = D_{t-1,0} a_t
    k_write_j = D_{C,j} k_j     b_write_j = D_{C,j} b_j

where a_t, of the generalized delta rule, reads the state before step t. Its E_t has no decay of t.
Channels are independent in all results but the sums over them. A thread block has one chunk of one
head, and adds tiles of 64 channels.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import KEY_TILE, Arrays, Blocks, Pair, Position, Variant
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

    def late(self, level: Any) -> jax.Array:
        """Return E_t of a level for "a", without the decay of step t."""
        t, i = _rows_and_columns()
        return self._of(steps_of_level(t, i, level) & (i != t))

    def upto(self, left: str) -> jax.Array:
        """Return the decays up to a step, or before it for "a", [64, keys]."""
        t, i = _rows_and_columns()
        return self._of(i < t if left == "a" else i <= t)

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


def inputs(p: Variant) -> tuple[str, ...]:
    """Return the names of queries and keys."""
    return ("q", "k", "a", "b") if p.vectors else ("q", "k")


def channels(p: Variant, arrays: Arrays, shape: tuple[int, ...]) -> Arrays:
    """Compute the products of pairs of steps, the inverse, and the rows with their decays.

    Args:
      p: the variant.
      arrays: `inputs`, "logs", and for the delta rule "beta". The logarithms are finite.
      shape: B and H.

    Returns:
      The `Variant.pairs` except "lower", in its place the "inverse", and the rows.
    """
    names = (*inputs(p), "logs", *(("beta",) if p.delta else ()))
    leaves, tree = jax.tree.flatten({name: arrays[name] for name in names})
    squares = {pair.name: p.computed for pair in p.pairs if pair.name != "lower"}
    squares |= {"inverse": p.computed} if p.solved else {}
    rows = {name: p.num.inputs if name == "q_read" else p.computed for name in row_names(p)}
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
        results = zip(outputs, refs[len(leaves) :], strict=True)
        targets = {name: ref.at[batch, head, chunk] for name, ref in results}

        def store(name: str, pieces: list[jax.Array], keys: Any = slice(None)) -> None:
            refs = smem.scratch[: len(pieces)]
            mp.store(refs, pieces)
            send(refs, targets[name].at[:, :, keys])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        sums: dict[str, Any] = {}
        tiles = range(0, p.keys, KEY_TILE)
        # One right factor after the other, because the registers hold two sums.
        for n, (right, start) in enumerate(itertools.product(rights(p), tiles)):
            keys = pl.ds(start, KEY_TILE)
            at = Position(batch, head, chunk, columns=None, keys=keys)
            if n:
                plgpu.commit_smem()  # all threads have read the blocks
            for name, block in smem.given.items():
                matrix_blocks.fetch(of_tile, name, sources[name], at, block, smem.barrier)
            plgpu.barrier_wait(smem.barrier)
            for name in rows if right == "k" else ():
                store(name, mp.split(decayed_row(p, smem.given, name), rows[name]), keys)
            sums = add_pairs(p, right, smem.given, smem.scratch, {} if start == 0 else sums)
            for name in sums if start == tiles[-1] else ():
                if name != "lower":
                    store(name, mp.split(sums[name], p.computed))
        if p.solved:
            lower = sums["lower"]
            lower = mp.by_row(smem.given["beta"][0], SQUARE) * lower if p.delta else -lower
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


def rights(p: Variant) -> tuple[str, ...]:
    """Return the right factors of `Variant.pairs`; the last one is the factor of "lower"."""
    return tuple(dict.fromkeys(pair.right for pair in p.pairs))


def row_names(p: Variant) -> tuple[str, ...]:
    """Return the names of the rows with their decays."""
    reads = ("k_read",) if p.delta else ("a_read", "b_write") if p.vectors else ()
    return ("q_read", *reads, "k_write")


def decayed_row(p: Variant, blocks: Blocks, name: str) -> jax.Array:
    """Return the rows of a name, such as "q_read", for a tile."""
    decays = Decays(p, blocks["logs"])
    row, way = name.split("_")
    return (decays.upto(row) if way == "read" else decays.after()) * mp.joined(blocks[row])


def add_pairs(
    p: Variant, right: str, blocks: Blocks, scratch: list[Any], sums: dict[str, Any]
) -> dict[str, Any]:
    """Add the products of pairs of steps in a tile, by the names of `Variant.pairs`.

    Args:
      p: the variant.
      right: the right factor of the pairs.
      blocks: `inputs` and "logs" of the tile.
      scratch: shared memory for the exact pieces of a matrix.
      sums: the result of the previous tile, or {}.
    """
    num = p.num
    decays = Decays(p, blocks["logs"])
    t, j = _rows_and_columns()
    wanted = [pair for pair in p.pairs if pair.right == right]
    sums = {pair.name: sums.get(pair.name, mp.zeros(*SQUARE)) for pair in wanted}
    for pair in wanted:
        if pair.left == "q":
            same_step = mp.product(num, blocks["q"], mp.transposed(blocks[right]))
            sums[pair.name] = sums[pair.name] + jnp.where(t == j, same_step, 0.0)

    def add_level(level: Any, sums: dict[str, Any]) -> dict[str, Any]:
        found, decay, mask = {}, decays.level(level), joins(t, j, level)
        early = mp.split(decay * mp.joined(blocks[right]), num.exact)
        mp.store(scratch, early)
        for pair in reversed(wanted):
            late = early
            if pair.left != right:
                by_left = decays.late(level) if pair.left == "a" else decay
                late = mp.split(by_left * mp.joined(blocks[pair.left]), num.exact)
            new = mp.product(num, late, mp.transposed(scratch), in_registers=True)
            found[pair.name] = sums[pair.name] + jnp.where(mask, new, 0.0)
        return found

    return lax.fori_loop(0, LEVELS, add_level, sums)


def pairs_back(
    p: Variant,
    blocks: Blocks,
    scratch: list[list[Any]],
    squares: dict[str, Any],
    sums: dict[str, Any],
) -> dict[str, Any]:
    """Add the terms of pairs of steps to cotangents.

    Args:
      p: the variant.
      blocks: `inputs`, "logs", and for the delta rule "beta", of the tile.
      scratch: shared memory for the exact pieces of two matrices.
      squares: cotangents of the products, by the names of `Variant.pairs`. Of the delta rule,
        "lower" is the cotangent of N, the products times beta.
      sums: the other terms of the cotangents, [64, keys] of the inputs and of "logs", and for the
        delta rule "d_beta" [64].
    """
    num, [first, second] = p.num, scratch

    def product(left: Pieces, right: Pieces, add: Any = None) -> jax.Array:
        return mp.product(num, left, right, add, in_registers=True)

    decays = Decays(p, blocks["logs"])
    t, j = _rows_and_columns()
    sums = dict(sums)
    for pair in p.pairs:
        if pair.left == "q":
            square = jnp.where(t == j, mp.load(squares[pair.name]), 0.0)
            ends = mp.split(square, num.exact)
            mp.store(first, ends)
            sums["q"] = product(ends, blocks[pair.right], sums["q"])
            turned = mp.transposed(first)
            sums[pair.right] = mp.product(num, turned, blocks["q"], sums[pair.right])

    def add_level(level: Any, sums: dict[str, Any]) -> dict[str, Any]:
        sums = dict(sums)
        for pair in p.pairs:
            sums |= add_pair(pair, level, sums)
        return sums

    # Short lives of values, because the sums take half of the registers: factors are read again.
    def add_pair(pair: Pair, level: Any, sums: dict[str, Any]) -> dict[str, Any]:
        decay, mask, weight = decays.level(level), joins(t, j, level), None
        late = decays.late(level) if pair.left == "a" else decay
        if p.delta and pair.name == "lower":
            weight = blocks["beta"][0]

        def masked() -> jax.Array:
            return jnp.where(mask, mp.load(squares[pair.name]), 0.0)

        def weighted(x: jax.Array) -> jax.Array:
            return x if weight is None else mp.by_row(weight, x.shape) * x

        mp.store(first, mp.split(decay * mp.joined(blocks[pair.right]), num.exact))
        by_left = late * product(mp.split(masked(), num.exact), first)
        found = {}
        if weight is not None:
            own = jnp.sum(mp.joined(blocks[pair.left]) * by_left, axis=1)
            found["d_beta"] = sums["d_beta"] + own
        by_left = weighted(by_left)
        found[pair.left] = sums[pair.left] + by_left
        change = mp.joined(blocks[pair.left]) * by_left
        mp.store(second, mp.split(weighted(masked()), num.exact))
        mp.store(first, mp.split(late * mp.joined(blocks[pair.left]), num.exact))
        by_right = decay * mp.product(num, mp.transposed(second), first)
        found[pair.right] = found.get(pair.right, sums[pair.right]) + by_right
        steps, logs = steps_of_level(j, t, level), sums["logs"]
        if pair.left == "a":
            mp.store(first, mp.split(change, num.exact))
            logs = product([mp.ones(steps & (j != t))], first, logs)
            change = jnp.zeros_like(change)
        change = change + mp.joined(blocks[pair.right]) * by_right
        mp.store(first, mp.split(change, num.exact))
        return found | {"logs": product([mp.ones(steps)], first, logs)}

    return lax.fori_loop(0, LEVELS, add_level, sums)
