"""Decays inside a chunk: products of exp(g) over the steps in between.

Such a product is never the exponential of a difference of two sums: g may be -inf (a reset enters
as just that), and differences of large sums have no correct digits left. Products are made in
blocks of 1, 2, 4, ... steps instead, each from the two of half its width. None exceeds one, and
none is divided by.

Without decay there is still what a reset clears. Then `g` is boolean, true where the state is
cleared before the step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import sequence_parallel
from seqjax.ops.core.custom_adjoint import custom_adjoint
from seqjax.ops.core.linalg import along_rows, down_columns, matmul, matmul_nt

SUB = 16  # steps in the blocks inside which pairs are selected by a mask


def by_step(g: jax.Array | None, like: jax.Array) -> jax.Array | None:
    """The decays in the shape of the keys, for forms that take step after step."""
    if g is None:
        return None
    g = g if g.ndim == 4 else g[..., None]
    return jnp.broadcast_to(decay_of(g.astype(like.dtype)), like.shape)


def decay_of(g: jax.Array) -> jax.Array:
    """exp(g), zero where g is -inf, whatever its imaginary part."""
    low = jnp.isneginf(jnp.real(g))
    return jnp.where(low, jnp.zeros_like(g), jnp.exp(jnp.where(low, jnp.zeros_like(g), g)))


def of_part(g: jax.Array | None, state: jax.Array, reset: jax.Array | None) -> jax.Array:
    """The decay of a state [B, H, K, V] over all steps of a device's part of the sequence."""
    if g is None:
        return jnp.ones_like(state[..., :1])
    total = jnp.sum(sequence_parallel.whole_part(g.astype(state.dtype), reset), axis=1)
    return jnp.exp(total if total.ndim == 3 else total[..., None])[..., None]


def _products(g: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Products of the decays a_i = exp(g_i) in blocks of 1, 2, 4, ..., C steps, C a power of two.

    Returns two lists of arrays [..., C, K]: upto[n][t], the product from the start of t's block of
    2^n steps to t, and after[n][j], from j + 1 to the end of j's block. Products, not exponentials
    of sums: one exponential a step and channel is all there is, and g may be -inf.
    """
    upto, after = [decay_of(g)], [jnp.ones_like(g)]
    for width in _widths(1, g.shape[-2]):
        first, second = _halves(upto[-1], width)
        left, right = _halves(after[-1], width)
        upto.append(_join(first, first[..., -1:, :] * second, g.shape))
        after.append(_join(left * second[..., -1:, :], right, g.shape))
    return upto, after


def decay_through(g: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """a_1 ... a_t and a_{t+1} ... a_C for a_i = exp(g_i): [..., C, K] each."""
    if g.dtype != bool:
        return _decay_through(g)
    count = _count(g[..., 0])[..., None]
    return (count == 0).astype(dtype), (count == count[..., -1:, :]).astype(dtype)


@jax.custom_jvp
def _decay_through(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    upto, after = _products(g)
    return upto[-1], after[-1]


@_decay_through.defjvp
def _decay_through_jvp(primals: Any, tangents: Any) -> Any:
    upto, after = _decay_through(*primals)
    (dg,) = tangents
    return (upto, after), (upto * sums_through(dg), after * sums_after(dg))


def _sums(after: bool, transposed: bool, x: jax.Array) -> jax.Array:
    t, i = order(x.shape[-2])
    included = i > t if after else i <= t
    included = (included.T if transposed else included).astype(x.dtype)
    # With a matrix of its own for each chunk: XLA on CPU would make one product with x^T of a
    # shared one, and take ten times as long to copy x^T.
    return matmul(jnp.broadcast_to(included, (*x.shape[:-2], *included.shape)), x)


def _summing(after: bool) -> Callable[[jax.Array], jax.Array]:
    return custom_adjoint(
        functools.partial(_sums, after, False), lambda _, ct: [_sums(after, True, ct)]
    )


sums_through = _summing(after=False)  # x_1 + ... + x_t over axis -2
sums_after = _summing(after=True)  # x_{t+1} + ... + x_C


def _halves(x: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The first and second halves of blocks of 2 * width steps: two [..., blocks, width, K]."""
    blocks = x.reshape(*x.shape[:-2], -1, 2, width, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _join(first: jax.Array, second: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.concatenate([first, second], axis=-2).reshape(shape)


def widen(x: jax.Array, channels: int) -> jax.Array:
    """[..., 1 or K] as [..., K]."""
    return x if x.shape[-1] == channels else along_rows(x[..., 0], channels)


def _count(events: jax.Array) -> jax.Array:
    """Count the events at or before each step; counts are equal where no event lies between.

    With 64-bit types enabled the counts have 64 bits. A loop over 8 float64 numbers that compares
    32-bit counts aborts the process on CPUs with AVX-512: the compiler of jaxlib 0.10.2 "cannot
    select" the instruction for its pairs of counts.
    """
    return jnp.cumsum(events, axis=-1, dtype=int)


def same_segment(events: jax.Array) -> jax.Array:
    """Whether j <= t and no event lies after j and up to t: [..., C] -> [..., C, C]."""
    count, (t, j) = _count(events), order(events.shape[-1])
    return (count[..., :, None] == count[..., None, :]) & (j <= t)


def _between(g: jax.Array) -> jax.Array:
    """a_{j+1} ... a_t for j <= t, else 0; a = exp(g): [..., C] -> [..., C, C].

    Every sum of g is made by itself, as a product with zeros and ones.
    """
    size = g.shape[-1]
    t, i = order(size)
    none = jnp.isneginf(jnp.real(g))
    upto = jnp.where(i <= t, down_columns(jnp.where(none, jnp.zeros_like(g), g), size), 0)
    after = jnp.broadcast_to((t > i).astype(g.dtype), upto.shape)
    return jnp.where(same_segment(none), jnp.exp(matmul(upto, after)), 0)


def decayed_products(
    lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], g: jax.Array
) -> list[list[jax.Array]]:
    """P[t, j] = sum_d left[t, d] a_{j+1, d} ... a_{t, d} right[j, d], a = exp(g), for j <= t.

    Zero for j > t.

    Args:
      lefts: arrays [..., C, K].
      rights: arrays [..., C, K].
      g: [..., C, 1] or [..., C, K], or boolean [..., C, 1].

    Returns:
      P of every left and right [..., C, C]; what they share becomes one matmul.

    One decay for all channels comes out of the product; decays per channel do not.
    """
    if g.shape[-1] == rights[0].shape[-1] and g.dtype != bool:
        return _by_channel(lefts, rights, g)
    products = [[matmul_nt(left, right) for right in rights] for left in lefts]
    if g.dtype == bool:
        same = same_segment(g[..., 0])
        return jax.tree.map(lambda p: jnp.where(same, p, jnp.zeros_like(p)), products)
    factor = _between(g[..., 0])
    return jax.tree.map(lambda p: p * factor, products)


@jax.custom_jvp
def _by_channel(
    lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], g: jax.Array
) -> list[list[jax.Array]]:
    """`decayed_products` for decays per channel.

    They factorise at any step between j and t. For every t and j < t there is one width at which
    j is in the first and t in the second half of the same block: the middle is such a step, and
    all pairs of that width are one matmul per block. Nothing is divided, no factor exceeds one,
    and no decay after t enters.
    """
    upto, after = _products(g)
    return _pairs(
        lefts,
        rights,
        [[x * decay for x in lefts] for decay in upto[:-1]],
        [[x * decay for x in rights] for decay in after[:-1]],
    )


def _pairs(
    lefts: Sequence[jax.Array],
    rights: Sequence[jax.Array],
    decayed_lefts: list[list[jax.Array]],
    decayed_rights: list[list[jax.Array]],
) -> list[list[jax.Array]]:
    """Return the products of `decayed_products` of every left and right.

    Args:
      lefts, rights: the factors of the diagonal.
      decayed_lefts: by level, lefts decayed from the start of their block of 2^level steps.
      decayed_rights: by level, rights decayed to the end of their block.
    """
    size, channels = rights[0].shape[-2:]
    base = min(size, SUB)

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], size // base, base, channels)

    def product(lefts: list[jax.Array], rights: list[jax.Array]) -> jax.Array:
        """[..., n, L, width, R, width] from lists of [..., n, width, K]."""
        shape = (*lefts[0].shape[:-1], len(rights), lefts[0].shape[-2])
        both = matmul_nt(jnp.concatenate(lefts, axis=-2), jnp.concatenate(rights, axis=-2))
        return both.reshape(*shape[:-3], len(lefts), *shape[-3:])

    # Inside blocks of SUB steps, matmuls of the whole block, of which the width's pairs are kept.
    steps = jnp.arange(base)
    rows, columns = steps[:, None, None], steps
    made = product([blocks(x) for x in lefts], [blocks(x) for x in rights])
    made = jnp.where(rows == columns, made, jnp.zeros_like(made))
    for level, width in enumerate(_widths(1, base)):
        met = (rows // (2 * width) == columns // (2 * width)) & (rows // width > columns // width)
        pairs = product(
            [blocks(x) for x in decayed_lefts[level]], [blocks(x) for x in decayed_rights[level]]
        )
        made = jnp.where(met, pairs, made)
    # Above, only the pairs that meet.
    for width in _widths(base, size):
        level = width.bit_length() - 1
        second = [_halves(x, width)[1] for x in decayed_lefts[level]]
        corner = product(second, [_halves(x, width)[0] for x in decayed_rights[level]])
        own = made.reshape(*corner.shape[:-4], 2, *corner.shape[-4:])
        first, last = own[..., 0, :, :, :, :], own[..., 1, :, :, :, :]
        top = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
        made = jnp.concatenate([top, jnp.concatenate([corner, last], axis=-1)], axis=-3)
    made = made.reshape(*made.shape[:-5], *made.shape[-4:])
    return [[made[..., n, :, m, :] for m in range(len(rights))] for n in range(len(lefts))]


@_by_channel.defjvp
def _by_channel_jvp(primals: Any, tangents: Any) -> Any:
    """Differentiate the products of every level by the decays that are in them.

    Cumulative sums over the whole chunk are simpler: pair (t, j) adds to the sum at t and subtracts
    from the sum at j. But then pairs that do not contain a step cancel in its gradient up to
    rounding, and where the decay is strong this rounding exceeds the gradient.
    """
    (lefts, rights, g), (d_lefts, d_rights, dg) = primals, tangents
    upto, after = (decays[:-1] for decays in _products(g))
    made = _by_channel(lefts, rights, g)
    sums = _sums_to_middle(dg)
    by_left = _pairs(
        d_lefts,
        rights,
        [
            [(dx + x * dc) * decay for x, dx in zip(lefts, d_lefts, strict=True)]
            for dc, decay in zip(sums, upto, strict=True)
        ],
        [[x * decay for x in rights] for decay in after],
    )
    by_right = _pairs(
        lefts,
        d_rights,
        [[x * decay for x in lefts] for decay in upto],
        [
            [(dx + x * dc) * decay for x, dx in zip(rights, d_rights, strict=True)]
            for dc, decay in zip(sums, after, strict=True)
        ],
    )
    return made, jax.tree.map(jnp.add, by_left, by_right)


def _within(width: int, unit: int) -> jax.Array:
    """Return the steps i between a step t and the middle of its block of 2 * width: [unit, unit].

    i <= t if t is in the second half, i > t if it is in the first.
    """
    t, i = order(unit)
    return (t // width == i // width) & jnp.where(t & width > 0, i <= t, i > t)


def _to_middle(x: jax.Array, width: int, transposed: bool) -> jax.Array:
    size, channels = x.shape[-2:]
    unit = max(2 * width, min(size, SUB))
    blocks = x.reshape(*x.shape[:-2], size // unit, unit, channels)
    within = _within(width, unit)
    within = (within.T if transposed else within).astype(x.dtype)
    within = jnp.broadcast_to(within, (*blocks.shape[:-2], unit, unit))  # see `_sums`
    return matmul(within, blocks).reshape(x.shape)


def _all_to_middle(x: jax.Array) -> list[jax.Array]:
    return [_to_middle(x, width, False) for width in _widths(1, x.shape[-2])]


def _all_to_middle_back(_: Any, cts: list[jax.Array]) -> list[jax.Array]:
    back = [_to_middle(ct, 1 << level, True) for level, ct in enumerate(cts)]
    return [functools.reduce(jnp.add, back)]


def _sums_to_middle(x: jax.Array) -> list[jax.Array]:
    """Return by level the sums of x, over axis -2, from every step to the middle of its block."""
    return custom_adjoint(_all_to_middle, _all_to_middle_back)(x) if x.shape[-2] > 1 else []


def _widths(start: int, stop: int) -> list[int]:
    """start, 2 start, 4 start, ... below stop."""
    widths = []
    while start < stop:
        widths.append(start)
        start *= 2
    return widths


def order(size: int) -> tuple[jax.Array, jax.Array]:
    """Steps as a column and as a row, to be compared."""
    steps = jnp.arange(size)
    return steps[:, None], steps[None, :]
