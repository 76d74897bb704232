"""Inverses of unit lower triangular matrices, for all heads of a block at once."""

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.numerics import (
    GROUP,
    Numerics,
    block_index,
    column_indices,
    powers_below,
    row_indices,
)


def inverses(matrices: list[jax.Array], num: Numerics) -> list[jax.Array]:
    """Compute (I + N)^-1 for the strictly lower triangular N [C, C] of each head.

    Blocks of 8 steps use forward substitution, in one sweep over all heads and blocks. For this,
    row i of block b of a head is in row i, columns 8 b to 8 b + 7 of a [8, C] array. Larger blocks
    use their halves: inv [[A, 0], [N, B]] = [[A', 0], [-B' N A', B']]. No intermediate exceeds the
    result and its factors. A series in powers of N would.
    """
    size, count = matrices[0].shape[0], len(matrices)
    block_of_column = block_index(column_indices(GROUP, size), GROUP)
    packed = []
    for n in matrices:
        block = jnp.where(block_of_column == 0, n[:GROUP], 0.0)
        for b in range(1, size // GROUP):
            block = jnp.where(block_of_column == b, n[b * GROUP : (b + 1) * GROUP], block)
        packed.append(block)
    blocks = jnp.concatenate(packed, axis=0)  # [heads * 8, C]
    i, j = row_indices(size), column_indices(size)
    shape = count * GROUP, size
    diagonal = (row_indices(*shape) & (GROUP - 1)) == (column_indices(*shape) & (GROUP - 1))
    x = jnp.where(diagonal, 1.0, 0.0)
    x = x.astype(num.dtype).reshape(count, GROUP, size)
    for index in range(GROUP - 1):
        # Copy column `index` of every block to all columns of the block.
        spread = num.ones(
            (block_index(i, GROUP) == block_index(j, GROUP)) & ((i & (GROUP - 1)) == index)
        )
        column = num.dot(blocks, spread, exact=True).reshape(count, GROUP, size)
        x = x - column * x[:, index : index + 1]
    result = [
        jnp.concatenate(
            [jnp.where(block_of_column == b, y, 0.0) for b in range(size // GROUP)], axis=0
        )
        for y in x
    ]
    for width in powers_below(size)[3:]:  # all heads at each width, to hide the latency of products
        # The corners N of all pairs of blocks fit one [width, C], because no two pairs share a
        # column.
        pair = block_index(column_indices(width, size), 2 * width)
        left = (column_indices(width, size) & width) == 0
        starts = range(width, size, 2 * width)
        inner = []
        for n, y in zip(matrices, result, strict=True):
            links = [
                jnp.where((pair == b) & left, n[at : at + width], 0.0)
                for b, at in enumerate(starts)
            ]
            inner.append(num.dot(sum(links[1:], start=links[0]), y, exact=True))
        corner = []
        for z, y in zip(inner, result, strict=True):
            second = [y[at : at + width] for at in starts]
            corner.append(
                num.dot(sum(second[1:], start=second[0]), _second_rows(z, pair), exact=True)
            )
        result = [y - _second_rows(z, pair) for y, z in zip(result, corner, strict=True)]
    return result


def _second_rows(x: jax.Array, pair: jax.Array) -> jax.Array:
    """Expand [width, C] to [C, C]: the columns of every pair in its second rows, else zero."""
    width, size = x.shape
    parts = []
    for b in range(size // (2 * width)):
        parts += [jnp.zeros_like(x), jnp.where(pair == b, x, 0.0)]
    return jnp.concatenate(parts, axis=0)
