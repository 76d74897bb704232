"""Decays inside a chunk: products of a_i = exp(g_i) over ranges of steps, g = log_decay.

    from_start[t]  = a_1 ... a_t
    to_end[t]      = a_{t+1} ... a_C
    P[t, j]        = sum_d left[t, d] a_{j+1, d} ... a_{t, d} right[j, d]        for j <= t

A product of decays is never computed as the exponential of a difference of two sums. At resets g is
-inf, and a difference of large sums has no correct digits. Products are computed over blocks of
1, 2, 4, ... steps instead, each from two blocks of half the width. No factor exceeds one, and
nothing is divided.

Without decays, `g` is boolean: True where the state is reset before the step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.ops.core import sequence_parallel
from seqjax.ops.core.custom_adjoint import custom_adjoint
from seqjax.ops.core.linalg import along_rows, matmul, product, spread
from seqjax.ops.matrix_state.block_decays import (
    between,
    block_decays,
    count_events,
    decay_of,
    order,
    same_segment,
    whole_block,
    widths,
)

SUB = 16  # steps in the blocks inside which a mask selects the pairs
NT = "tk,jk->tj"


def by_step(g: jax.Array | None, like: jax.Array, *, repeat: bool) -> jax.Array | None:
    """Return the decays [..., H, K] or [..., H, 1] for the sequential algorithm.

    With `repeat` they are repeated for all channels of the keys. The gradient of a decay per head
    is then one sum over channels after the loop, and not one sum for each step.
    """
    if g is None:
        return None
    decay = decay_of(g.astype(like.dtype))
    return jnp.broadcast_to(decay, (*g.shape[:-1], like.shape[-1])) if repeat else decay


def shard_decay(g: jax.Array | None, state: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Return the decay of a state [B, H, K, V] over all steps of a device's sequence shard."""
    if g is None:
        return jnp.ones_like(state[..., :1])
    total = jnp.sum(sequence_parallel.whole_part(g.astype(state.dtype), reset), axis=1)
    return jnp.exp(total if total.ndim == 3 else total[..., None])[..., None]


def cumulative_decays(
    log_decay: jax.Array, dtype: Any, channels: int | None = None, *, repeat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return the decays from the start of a chunk to each step, and from each step to the end.

        from_start[t] = a_1 ... a_t        to_end[t] = a_{t+1} ... a_C        a = exp(log_decay)

    Args:
      log_decay: [..., C, 1] or [..., C, K], C a power of two; or boolean [..., C, 1], True where
        the state is reset, for chunks without decays.
      dtype: dtype of the result for boolean `log_decay`.
      channels: K, to repeat decays [..., C, 1] for all channels; by default not repeated.
      repeat: whether to compute the decays as `decayed_products` does for bfloat16 arrays, which
        is faster on GPUs and slower on CPUs.

    Returns:
      Two arrays of the shape of `log_decay`, or [..., C, channels].
    """
    if log_decay.dtype != bool:
        both = _cumulative_decays(repeat, log_decay)
        return both if channels is None else (widen(both[0], channels), widen(both[1], channels))
    count = count_events(log_decay[..., 0])[..., None]
    if channels is not None:
        count = jnp.broadcast_to(count, (*count.shape[:-1], channels))
    return (count == 0).astype(dtype), (count == count[..., -1:, :]).astype(dtype)


def of_chunk(log_decay: jax.Array, from_start: jax.Array, *, repeat: bool) -> jax.Array:
    """Return the decay over all steps of a chunk, [..., 1, K] or [..., 1, 1].

    It is the last row of `from_start`, which GPUs would compute whole for this row alone. With
    `repeat` it is computed from the products that `cumulative_decays` computes there.
    """
    if repeat and log_decay.dtype != bool:
        return whole_block(log_decay)
    return from_start[..., -1:, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cumulative_decays(repeat: bool, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    upto, after = block_decays(g, repeat)
    return upto[-1], after[-1]


@_cumulative_decays.defjvp
def _cumulative_decays_jvp(repeat: bool, primals: Any, tangents: Any) -> Any:
    upto, after = _cumulative_decays(repeat, *primals)
    (dg,) = tangents
    return (upto, after), (upto * sums_through(dg), after * sums_after(dg))


def _sums(after: bool, transposed: bool, x: jax.Array) -> jax.Array:
    t, i = order(x.shape[-2])
    included = i > t if after else i <= t
    included = (included.T if transposed else included).astype(x.dtype)
    # Each chunk has its own copy of the matrix. With a shared one, XLA on CPU computes a single
    # product with x^T, and copying x^T takes ten times as long.
    return matmul(jnp.broadcast_to(included, (*x.shape[:-2], *included.shape)), x)


def _summing(after: bool) -> Callable[[jax.Array], jax.Array]:
    return custom_adjoint(
        functools.partial(_sums, after, False), lambda _, ct: [_sums(after, True, ct)]
    )


sums_through = _summing(after=False)  # x_1 + ... + x_t over axis -2
sums_after = _summing(after=True)  # x_{t+1} + ... + x_C


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Return x times a factor, computed in the dtype of the factor and rounded to that of x."""
    return (spread(x, factor).astype(factor.dtype) * factor).astype(x.dtype)


def widen(x: jax.Array, channels: int) -> jax.Array:
    """Repeat the last axis, of size 1 or `channels`, to `channels`."""
    return x if x.shape[-1] == channels else along_rows(x[..., 0], channels)


def decayed_products(
    lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], log_decay: jax.Array
) -> list[list[jax.Array]]:
    """Return the decayed products of the steps of a chunk.

        P[t, j] = sum_d left[t, d] a_{j+1, d} ... a_{t, d} right[j, d]        a = exp(log_decay)

    for j <= t, and zero for j > t. With queries as lefts and keys as rights, these are the scores
    of a decayed attention.

    Args:
      lefts: arrays [..., C, K].
      rights: arrays [..., C, K].
      log_decay: [..., C, 1] or [..., C, K], C a power of two; or boolean [..., C, 1], True where
        the state is reset, for chunks without decays.

    Returns:
      P [..., C, C] of every left and right, as a list of lists, in float32 for bfloat16 arrays. One
      call with several of them shares the decays.
    """
    if log_decay.shape[-1] == rights[0].shape[-1] and log_decay.dtype != bool:
        lefts, rights = (tuple(spread(x, log_decay) for x in xs) for xs in (lefts, rights))
        return _by_channel(lefts, rights, log_decay)
    # One decay for all channels factors out of the sum.
    if rights[0].dtype == jnp.bfloat16:  # one product, which XLA for GPU would transpose
        left, right = (jnp.concatenate(xs, axis=-2) for xs in (lefts, rights))
        rows = jnp.split(product(left, right, NT), len(lefts), axis=-2)
        products = [part for row in rows for part in jnp.split(row, len(rights), axis=-1)]
    else:
        products = [product(left, right, NT) for left in lefts for right in rights]
    if log_decay.dtype == bool:
        same = same_segment(log_decay[..., 0])
        products = [jnp.where(same, p, jnp.zeros_like(p)) for p in products]
    else:
        factor = between(log_decay[..., 0], by_level=rights[0].dtype == jnp.bfloat16)
        products = [spread(p, factor) * factor for p in products]
    count = len(rights)
    return [products[n : n + count] for n in range(0, len(products), count)]


@jax.custom_jvp
def _by_channel(
    lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], g: jax.Array
) -> list[list[jax.Array]]:
    """Return `decayed_products` for decays per channel.

    The decays from j to t factor at any step between j and t. For every t and j < t there is one
    width at which j is in the first and t in the second half of the same block. The middle of the
    block is such a step, and all pairs of that width are one matmul per block. Nothing is divided,
    no factor exceeds one, and no decay after t contributes.
    """
    upto, after = block_decays(g, rights[0].dtype == jnp.bfloat16)
    left, right = _stacked(lefts), _stacked(rights)
    return _pairs(
        (left, right),
        [scaled(left, _stacked((decay,))) for decay in upto[:-1]],
        [scaled(right, _stacked((decay,))) for decay in after[:-1]],
    )


def _stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the blocks of SUB steps of n arrays: n times [..., C, K] -> [..., C / SUB, n, SUB, K].

    One matmul per block then computes the products of all arrays.
    """
    blocked = [x.reshape(*x.shape[:-2], -1, min(x.shape[-2], SUB), x.shape[-1]) for x in arrays]
    return jnp.stack(blocked, axis=-3)


def _pairwise(left: jax.Array, right: jax.Array) -> list[list[jax.Array]]:
    """Return the products of the steps of every left and right, inside groups of m blocks.

    [..., m, lefts, SUB, K] and [..., m, rights, SUB, K] -> lists of [..., m * SUB, m * SUB].
    """
    rows, columns = left.shape[-4:-1], right.shape[-4:-1]
    left, right = (x.reshape(*x.shape[:-4], -1, x.shape[-1]) for x in (left, right))
    both = product(left, right, NT)
    both = both.reshape(*both.shape[:-2], *rows, *columns)
    width = rows[0] * rows[2]
    return [
        [
            both[..., n, :, :, m, :].reshape(*both.shape[:-6], width, width)
            for m in range(columns[1])
        ]
        for n in range(rows[1])
    ]


def _pairs(
    factors: tuple[jax.Array, jax.Array],
    decayed_lefts: list[jax.Array],
    decayed_rights: list[jax.Array],
) -> list[list[jax.Array]]:
    """Return the products of `decayed_products` of every left and right, from `_stacked` arrays.

    Args:
      factors: the lefts and the rights of the diagonal.
      decayed_lefts: by level, lefts decayed from the start of their block of 2^level steps.
      decayed_rights: by level, rights decayed to the end of their block.
    """
    blocks, base = factors[0].shape[-4], factors[0].shape[-2]

    def alone(x: jax.Array) -> jax.Array:  # groups of one block
        return x.reshape(*x.shape[:-3], 1, *x.shape[-3:])

    def halves_of(x: jax.Array, half: int, width: int) -> jax.Array:
        return x.reshape(*x.shape[:-4], -1, 2, width // base, *x.shape[-3:])[..., half, :, :, :, :]

    # Inside blocks of SUB steps, compute matmuls of the whole block and select each width's pairs.
    levels = [_pairwise(*map(alone, factors))]
    for level in range(len(widths(1, base))):
        levels.append(_pairwise(alone(decayed_lefts[level]), alone(decayed_rights[level])))
    # For larger widths, compute only the pairs of the two halves.
    for width in widths(base, blocks * base):
        level = width.bit_length() - 1
        second = halves_of(decayed_lefts[level], 1, width)
        levels.append(_pairwise(second, halves_of(decayed_rights[level], 0, width)))
    return jax.tree.map(lambda *pairs: _assembled(pairs, base), *levels)


def _assembled(levels: Sequence[jax.Array], base: int) -> jax.Array:
    """Return P [..., C, C] from its diagonal and the pairs of every level."""
    rows, columns = order(base)
    made = jnp.where(rows == columns, levels[0], jnp.zeros_like(levels[0]))
    small = widths(1, base)
    for width, pairs in zip(small, levels[1:], strict=False):
        met = (rows // (2 * width) == columns // (2 * width)) & (rows // width > columns // width)
        made = jnp.where(met, pairs, made)
    for corner in levels[1 + len(small) :]:
        own = made.reshape(*corner.shape[:-2], 2, *corner.shape[-2:])
        top = jnp.concatenate([own[..., 0, :, :], jnp.zeros_like(corner)], axis=-1)
        made = jnp.concatenate(
            [top, jnp.concatenate([corner, own[..., 1, :, :]], axis=-1)], axis=-2
        )
    return made.reshape(*made.shape[:-3], *made.shape[-2:])


@_by_channel.defjvp
def _by_channel_jvp(primals: Any, tangents: Any) -> Any:
    """Differentiate the products of every level with respect to their own decays.

    Cumulative sums over the whole chunk are simpler: pair (t, j) adds to the sum at t and subtracts
    from the sum at j. But then pairs that do not contain a step cancel in its gradient up to
    rounding, and where the decay is strong this rounding exceeds the gradient.

    The tangents of decays are stacked as often as the factors. If they were broadcast, their
    transpose would sum over arrays of seven axes, which `tests/ops/test_ranks.py` forbids.
    """
    (lefts, rights, g), (d_lefts, d_rights, dg) = primals, tangents
    upto, after = (decays[:-1] for decays in block_decays(g, rights[0].dtype == jnp.bfloat16))
    made = _by_channel(lefts, rights, g)
    sums = _sums_to_middle(dg)
    left, right, d_left, d_right = (_stacked(x) for x in (lefts, rights, d_lefts, d_rights))
    upto, after = ([_stacked((x,)) for x in level] for level in (upto, after))

    def change(x: jax.Array, dx: jax.Array, dc: jax.Array, decay: jax.Array) -> jax.Array:
        wide = decay.dtype
        return ((dx.astype(wide) + x.astype(wide) * dc) * decay).astype(x.dtype)

    by_left = _pairs(
        (d_left, right),
        [
            change(left, d_left, _stacked((dc,) * len(lefts)), decay)
            for dc, decay in zip(sums, upto, strict=True)
        ],
        [scaled(right, decay) for decay in after],
    )
    by_right = _pairs(
        (left, d_right),
        [scaled(left, decay) for decay in upto],
        [
            change(right, d_right, _stacked((dc,) * len(rights)), decay)
            for dc, decay in zip(sums, after, strict=True)
        ],
    )
    return made, jax.tree.map(jnp.add, by_left, by_right)


def _within(width: int, unit: int) -> np.ndarray:
    """Return the steps i between a step t and the middle of its block of 2 * width: [unit, unit].

    i <= t if t is in the second half, i > t if it is in the first.
    """
    t, i = order(unit)
    return (t // width == i // width) & np.where(t & width > 0, i <= t, i > t)


def _to_middle(x: jax.Array, width: int, transposed: bool) -> jax.Array:
    size, channels = x.shape[-2:]
    unit = max(2 * width, min(size, SUB))
    blocks = x.reshape(*x.shape[:-2], size // unit, unit, channels)
    within = _within(width, unit)
    within = (within.T if transposed else within).astype(x.dtype)
    each = jnp.broadcast_to(within, (*blocks.shape[:-2], unit, unit))  # see `_sums`
    return matmul(each, blocks).reshape(x.shape)


def _all_to_middle(x: jax.Array) -> list[jax.Array]:
    return [_to_middle(x, width, False) for width in widths(1, x.shape[-2])]


def _all_to_middle_back(_: Any, cts: list[jax.Array]) -> list[jax.Array]:
    back = [_to_middle(ct, 1 << level, True) for level, ct in enumerate(cts)]
    return [functools.reduce(jnp.add, back)]


def _sums_to_middle(x: jax.Array) -> list[jax.Array]:
    """Return by level the sums of x, over axis -2, from every step to the middle of its block."""
    return custom_adjoint(_all_to_middle, _all_to_middle_back)(x) if x.shape[-2] > 1 else []
