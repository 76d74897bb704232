"""Inverses of unit lower triangular matrices, of all heads of a block side by side."""

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.chunk_math import GROUP, Numerics, block_of, cols, rows, widths


def inverses(matrices: list[jax.Array], num: Numerics) -> list[jax.Array]:
    """(I + N)^-1 for strictly lower triangular N [C, C], of all heads side by side.

    Blocks of 8 steps by forward substitution, those of all heads and blocks in one sweep: row i of
    block b of a head stands in row i, columns 8 b to 8 b + 7 of a [8, C] array. Larger ones from
    their halves: inv [[A, 0], [N, B]] = [[A', 0], [-B' N A', B']]. No intermediate exceeds the
    result and its factors, as powers of N would.
    """
    size, count = matrices[0].shape[0], len(matrices)
    own = block_of(cols(GROUP, size), GROUP)
    packed = []
    for n in matrices:
        block = jnp.where(own == 0, n[:GROUP], 0.0)
        for b in range(1, size // GROUP):
            block = jnp.where(own == b, n[b * GROUP : (b + 1) * GROUP], block)
        packed.append(block)
    blocks = jnp.concatenate(packed, axis=0)  # [heads * 8, C]
    i, j = rows(size), cols(size)
    every = count * GROUP, size
    place = (rows(*every) & (GROUP - 1)) == (cols(*every) & (GROUP - 1))
    x = jnp.where(place, 1.0, 0.0)
    x = x.astype(num.dtype).reshape(count, GROUP, size)
    for step in range(GROUP - 1):
        # Column `step` of every block, in all of its columns.
        spread = num.ones((block_of(i, GROUP) == block_of(j, GROUP)) & ((i & (GROUP - 1)) == step))
        column = num.dot(blocks, spread, exact=True).reshape(count, GROUP, size)
        x = x - column * x[:, step : step + 1]
    made = [
        jnp.concatenate([jnp.where(own == b, y, 0.0) for b in range(size // GROUP)], axis=0)
        for y in x
    ]
    for width in widths(size)[3:]:  # of all heads at each, so that they wait for nothing
        # What pairs of blocks exchange, the second rows of all pairs in one [width, C]: a pair has
        # columns of its own.
        pair = block_of(cols(width, size), 2 * width)
        left = (cols(width, size) & width) == 0
        starts = range(width, size, 2 * width)
        inner = []
        for n, y in zip(matrices, made, strict=True):
            links = [
                jnp.where((pair == b) & left, n[at : at + width], 0.0)
                for b, at in enumerate(starts)
            ]
            inner.append(num.dot(sum(links[1:], start=links[0]), y, exact=True))
        corner = []
        for z, y in zip(inner, made, strict=True):
            second = [y[at : at + width] for at in starts]
            corner.append(
                num.dot(sum(second[1:], start=second[0]), _second_rows(z, pair), exact=True)
            )
        made = [y - _second_rows(z, pair) for y, z in zip(made, corner, strict=True)]
    return made


def _second_rows(x: jax.Array, pair: jax.Array) -> jax.Array:
    """[width, C] -> [C, C]: the columns of every pair in its second rows, zero elsewhere."""
    width, size = x.shape
    parts = []
    for b in range(size // (2 * width)):
        parts += [jnp.zeros_like(x), jnp.where(pair == b, x, 0.0)]
    return jnp.concatenate(parts, axis=0)
