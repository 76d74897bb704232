"""Inverses of unit lower triangular matrices, for all heads of a block at once."""

import functools

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
    are stored in the same way, and use their halves: inv [[A, 0], [N, B]] =
    [[A', 0], [-B' N A', B']]. No intermediate exceeds the result and its factors. A series in
    powers of N would.
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
    result = list(x)  # block b of width w is in rows 0 to w - 1, in the columns of the block
    for width in powers_below(size)[3:]:  # all heads at each width, to hide the latency of products
        # The corners N of all pairs of blocks fit one [width, C], because no two pairs share a
        # column.
        columns = column_indices(width, size)
        block, pair = block_index(columns, width), block_index(columns, 2 * width)
        left = (columns & width) == 0
        on_diagonal = functools.partial(_diagonal, block=block)
        second_rows = functools.partial(_second_rows, pair=pair)
        inner = []
        for n, y in zip(matrices, result, strict=True):
            links = [
                jnp.where((pair == b) & left, n[at : at + width], 0.0)
                for b, at in enumerate(range(width, size, 2 * width))
            ]
            total = sum(links[1:], start=links[0])
            inner.append(num.dot(total, y, exact=True, expand=on_diagonal))
        corner = [
            num.dot(jnp.where(left, 0.0, y), z, exact=True, expand=second_rows)
            for z, y in zip(inner, result, strict=True)
        ]
        result = [
            jnp.concatenate([jnp.where(left, y, 0.0), jnp.where(left, -z, y)], axis=0)
            for y, z in zip(result, corner, strict=True)
        ]
    return result


def _diagonal(x: jax.Array, block: jax.Array) -> jax.Array:
    """Expand blocks in a row [width, C] to a block-diagonal matrix [C, C]."""
    width, size = x.shape
    return jnp.concatenate([jnp.where(block == b, x, 0.0) for b in range(size // width)], axis=0)


def _second_rows(x: jax.Array, pair: jax.Array) -> jax.Array:
    """Expand [width, C] to [C, C]: the columns of every pair in its second rows, else zero."""
    width, size = x.shape
    parts = []
    for b in range(size // (2 * width)):
        parts += [jnp.zeros_like(x), jnp.where(pair == b, x, 0.0)]
    return jnp.concatenate(parts, axis=0)
