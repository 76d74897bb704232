"""Products of pairs of steps in a chunk, for the matrix-state kernels on GPU: the first pass.

They do not depend on the state, so all chunks run in parallel, one thread block each. With D_{t,j}
the decays of the steps after j and up to t, the pass computes for j <= t

    scores_{t,j} = q_t^T D_{t,j} k_j

and for the delta rule the inverse (I + N)^-1, with N the strictly lower part of
beta_t k_t^T D_{t,j} k_j.

The inverse starts from blocks of one step and joins neighbors. With the corner E between two
inverted blocks, the inverse X becomes X - X E X. All pairs of blocks share these two products. No
power of N is computed: powers of N are huge if keys repeat, and the inverse is not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import Arrays, Blocks, Position, Variant
from pallas_kernels.gpu.matrix_products import CHUNK, Numerics
from pallas_kernels.jax_compat import array_like

SQUARE = (CHUNK, CHUNK)
LEVELS = CHUNK.bit_length() - 1  # blocks of 2, 4, ... and 64 steps
LOG_ZERO = -1e30  # exp of it is zero, and sums of a chunk of them are finite
LOG_PIECES = 3  # a sum of logarithms needs all bits of a float32 number


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      given: blocks of the inputs, by name.
      first, second: pieces of matrices of pairs of steps, right factors and results.
      barrier: completed when the inputs have arrived.
    """

    given: Blocks
    first: list[Any]
    second: list[Any]
    barrier: Any


def pairs(p: Variant, arrays: Arrays, shape: tuple[int, ...]) -> Arrays:
    """Compute "scores", and for the delta rule "inverse".

    Args:
      p: the variant.
      arrays: "q" and "k", and where the variant has them, "log_decay" and "beta". The logarithms
        are finite.
      shape: B and H.
    """
    names = ("q", "k", *(("log_decay",) if p.decay else ()), *(("beta",) if p.delta else ()))
    leaves, tree = jax.tree.flatten({name: arrays[name] for name in names})
    outputs = {}
    for name in ("scores", "inverse") if p.delta else ("scores",):
        size = (*shape, p.chunks, p.computed, *SQUARE)
        outputs[name] = array_like(leaves[0], size, jnp.bfloat16)

    def body(*refs: Any, smem: SharedMemory) -> None:
        batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
        at = Position(batch, head, chunk, columns=None)
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        for name, block in smem.given.items():
            matrix_blocks.fetch(p, name, sources[name], at, block, smem.barrier)
        plgpu.barrier_wait(smem.barrier)
        targets = [ref.at[at.batch, at.head, at.chunk] for ref in refs[len(leaves) :]]
        _chunk(p, smem, targets)

    given = {
        name: matrix_blocks.buffers(p, name, matrix_blocks.pieces(name, arrays[name]))
        for name in names
    }
    smem = SharedMemory(
        given=given,
        first=matrix_blocks.buffers(p, "scores", p.computed),
        second=matrix_blocks.buffers(p, "inverse", p.computed) if p.delta else [],
        barrier=plgpu.Barrier(num_arrivals=sum(map(len, given.values()))),
    )
    grid = {"chunk": p.chunks, "head": shape[1], "batch": shape[0]}
    interpret = p.num.interpret
    found = matrix_blocks.launch("matrix_pairs", body, leaves, outputs, smem, grid, interpret)
    return {name: [x] for name, x in found.items()}


def _chunk(p: Variant, smem: SharedMemory, targets: list[Any]) -> None:
    num, (q, k) = p.num, (smem.given[name] for name in "qk")
    t, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    factor = decays(num, smem.given["log_decay"][0], smem.first[0]) if p.decay else None

    def decayed(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, x if factor is None else x * factor, 0.0)

    scores = decayed(mp.product(num, q, mp.transposed(k)), t >= j)
    mp.store(smem.first, mp.split(scores, p.computed))
    send(smem.first, targets[0])
    if p.delta:
        overlaps = decayed(mp.product(num, k, mp.transposed(k)), t > j)
        lower = mp.by_row(smem.given["beta"][0], SQUARE) * overlaps
        mp.store(smem.second, mp.split(inverse(num, lower, smem.second), num.exact))
        send(smem.second, targets[1])
    plgpu.wait_smem_to_gmem(0)


def send(pieces: list[Any], target: Any) -> None:
    """Start the copies of pieces to [pieces, 64, columns] in global memory."""
    for i, piece in enumerate(pieces):
        plgpu.copy_smem_to_gmem(piece, target.at[i])


def decays(num: Numerics, logs: Any, scratch: Any) -> jax.Array:
    """Return D_{t,j} for j <= t, from sums of only the logarithms between j and t.

    Args:
      num: the accuracy.
      logs: logarithms [64] in shared memory.
      scratch: a matrix [64, 64] in shared memory, which is overwritten.
    """
    i, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    mp.store([scratch], [mp.ones(i > j)])
    upto = jnp.where(j <= i, mp.by_column(logs, SQUARE), 0.0)
    return jnp.exp(mp.product(num, mp.split(upto, LOG_PIECES), [scratch], in_registers=True))


def joins(t: jax.Array, j: jax.Array, level: Any) -> jax.Array:
    """Return where t and j < t are in different halves of the same block of 2^(level + 1) steps."""
    level = jnp.int32(level)
    t, j = lax.shift_right_logical(t, level), lax.shift_right_logical(j, level)
    return (t > j) & (
        lax.shift_right_logical(t, jnp.int32(1)) == lax.shift_right_logical(j, jnp.int32(1))
    )


def inverse(num: Numerics, lower: jax.Array, scratch: list[Any]) -> jax.Array:
    """Return (I + N)^-1 for a strictly lower N in registers."""
    i, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)

    def corners(level: int) -> jax.Array:
        return jnp.where(joins(i, j, level), lower, 0.0)

    found = jnp.where(i == j, 1.0, 0.0) - corners(0)
    for level in range(1, LEVELS):
        pieces = mp.split(found, num.exact)
        mp.store(scratch, pieces)
        links = mp.split(corners(level), num.exact)
        inner = mp.product(num, links, scratch, in_registers=True)
        mp.store(scratch, mp.split(inner, num.exact))
        found = found - mp.product(num, pieces, scratch, in_registers=True)
    return found
