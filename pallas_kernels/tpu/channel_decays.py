"""Decays per channel in a chunk of one head, for the products of `chunk_math`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.chunk_math import DecaySumCotangents, PairCotangents, SharedDecay
from pallas_kernels.tpu.numerics import (
    GROUP,
    NT,
    TN,
    Numerics,
    block_index,
    column_indices,
    powers_below,
    row_indices,
    rows_down,
    rows_up,
)


def _broadcast_row(x: jax.Array, width: int, at: int) -> jax.Array:
    """Copy row `at` of each block of `width` rows of x [C, K] to all rows of the block."""
    size, channels = x.shape
    unit = max(GROUP, width)
    blocks = x.reshape(size // unit, unit, channels)
    result = None
    row_in_unit = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    for start in range(0, unit, width):
        row = jnp.broadcast_to(blocks[:, start + at : start + at + 1], blocks.shape)
        result = row if result is None else jnp.where(row_in_unit >= start, row, result)
    assert result is not None
    return result.reshape(size, channels)


def _twice_as_wide(
    upto: jax.Array, after: jax.Array | None, width: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the decays in blocks of 2 `width` steps from those in blocks of `width` steps."""
    if width == 1:
        odd = (row_indices(*upto.shape) & 1) > 0
        before, behind = rows_down(upto), rows_up(upto)
        return jnp.where(odd, before * upto, upto), jnp.where(odd, 1.0, behind)
    assert after is not None
    if width < GROUP:
        second = (row_indices(*upto.shape) & width) > 0
        first_end = _broadcast_row(upto, 2 * width, width - 1)
        second_end = _broadcast_row(upto, 2 * width, 2 * width - 1)
        return (
            jnp.where(second, first_end * upto, upto),
            jnp.where(second, after, after * second_end),
        )
    uptos, afters = [], []
    for start in range(0, upto.shape[0], 2 * width):
        middle, end = start + width, start + 2 * width
        uptos += [upto[start:middle], upto[middle - 1 : middle] * upto[middle:end]]
        afters += [after[start:middle] * upto[end - 1 : end], after[middle:end]]
    return jnp.concatenate(uptos, axis=0), jnp.concatenate(afters, axis=0)


def _times(x: jax.Array, decay: jax.Array | None) -> jax.Array:
    return x if decay is None else x.astype(decay.dtype) * decay


def _pairs_at(t: jax.Array, j: jax.Array, width: int) -> jax.Array:
    """Return where j is in the first and t in the second half of the same block of 2 `width`."""
    same = block_index(t, 2 * width) == block_index(j, 2 * width)
    return same & (block_index(t, width) > block_index(j, width))


def _half(x: jax.Array, width: int, half: int) -> jax.Array:
    """Return the rows of x in the first (0) or second (1) halves of all blocks of 2 `width`."""
    starts = range(half * width, x.shape[0], 2 * width)
    return jnp.concatenate([x[start : start + width] for start in starts], axis=0)


def _first_halves(x: jax.Array, width: int) -> jax.Array:
    """Expand the rows of first halves by rows of zeros in the second halves."""
    return _join(x, jnp.zeros_like(x), width)


def _pairs_of_halves(size: int, width: int) -> jax.Array:
    """Return where `_pairs_at` is true in the rows of the second halves, [size / 2, size]."""
    rows, columns = row_indices(size // 2, size), column_indices(size // 2, size)
    return block_index(columns, width) == 2 * block_index(rows, width)


def _join(first: jax.Array, second: jax.Array, width: int) -> jax.Array:
    """Invert `_half`."""
    parts = []
    for start in range(0, first.shape[0], width):
        parts += [first[start : start + width], second[start : start + width]]
    return jnp.concatenate(parts, axis=0)


class ChannelDecays(SharedDecay):
    """Decays per channel, from finite logarithms g [C, K].

    The decays from j to t factorize at any step between. For every t and j < t there is one block
    width at which j is in the first and t in the second half of the same block. The decays then
    factorize at the middle of the block. From 8 steps on, half of a block is whole registers, and
    the other half is left out.
    """

    def __init__(
        self, num: Numerics, size: int, load: Callable[[], jax.Array], values: int
    ) -> None:
        """Prepare the decays of one head, with states [K, values].

        Args:
          num: accuracy of products.
          size: steps in a chunk.
          load: returns g. Nothing is computed before it is used, because the numbers of all heads
            together do not fit the registers.
          values: columns of a state.
        """
        self.num = num
        self.lower = row_indices(size) >= column_indices(size)
        self.load = load
        self.values = values
        self.levels: list[tuple[jax.Array, jax.Array | None]] = []

    def level(self, n: int) -> tuple[jax.Array, jax.Array | None]:
        """Return the decays up to a step and after it in blocks of 2**n steps; None for ones."""
        if not self.levels:
            self.levels.append((jnp.exp(self.load()), None))
        while len(self.levels) <= n:
            self.levels.append(_twice_as_wide(*self.levels[-1], 1 << (len(self.levels) - 1)))
        return self.levels[n]

    @functools.cached_property
    def _chunk_level(self) -> tuple[jax.Array, jax.Array]:
        size = self.level(0)[0].shape[0]
        upto, after = self.level(len(powers_below(size)))
        assert after is not None
        return upto, after

    @property
    def upto(self) -> jax.Array:
        """Decays up to a step, [C, K]."""
        return self._chunk_level[0]

    @property
    def after(self) -> jax.Array:
        """Decays after a step, [C, K]."""
        return self._chunk_level[1]

    def pairs_with(self, lefts: list[jax.Array], rights: list[jax.Array]) -> list[list[jax.Array]]:
        """Compute P [C, C] for every right factor and every left factor."""
        size = rights[0].shape[0]
        small = [w for w in powers_below(size) if w < GROUP]
        products = self._products(jnp.concatenate(lefts, axis=0), jnp.concatenate(rights, axis=0))
        t, j = row_indices(size), column_indices(size)
        result = [[jnp.where(t == j, p, 0.0) for p in by_left] for by_left in products]
        for n, width in enumerate(small):
            upto, after = self.level(n)
            left = jnp.concatenate([x.astype(upto.dtype) * upto for x in lefts], axis=0)
            right = jnp.concatenate([_times(x, after) for x in rights], axis=0)
            found = self._products(left, right, exact=True)
            mask = _pairs_at(t, j, width)
            result = [
                [jnp.where(mask, new, p) for new, p in zip(*by_left, strict=True)]
                for by_left in zip(found, result, strict=True)
            ]
        for n, width in list(enumerate(powers_below(size)))[len(small) :]:
            upto, after = self.level(n)
            assert after is not None
            left_decay, right_decay = _half(upto, width, 1), _half(after, width, 0)
            later = [_half(x.astype(upto.dtype), width, 1) * left_decay for x in lefts]
            earlier = [_half(x.astype(upto.dtype), width, 0) * right_decay for x in rights]
            expand = functools.partial(_first_halves, width=width)
            stacked = [
                self.num.dot(jnp.concatenate(later, axis=0), x, NT, exact=True, expand=expand)
                for x in earlier
            ]
            mask = _pairs_of_halves(size, width)
            for by_left, products_of in zip(result, stacked, strict=True):
                for i, p in enumerate(by_left):
                    new = products_of[i * size // 2 : (i + 1) * size // 2]
                    second = jnp.where(mask, new, _half(p, width, 1))
                    by_left[i] = _join(_half(p, width, 0), second, width)
        return result

    def pairs_back(
        self,
        cts: list[jax.Array],
        lefts: list[jax.Array],
        right: jax.Array,
        pairs: list[jax.Array],
        exact: bool = False,
    ) -> PairCotangents:
        """Compute the cotangents of the factors and of g from those of P; see `SharedDecay`."""
        del pairs
        size = right.shape[0]
        narrow = right
        lefts, right = [x.astype(self.num.dtype) for x in lefts], right.astype(self.num.dtype)
        diagonal = row_indices(size) == column_indices(size)
        ends = [jnp.sum(jnp.where(diagonal, ct, 0.0), axis=1, keepdims=True) for ct in cts]
        d_lefts = [end * right for end in ends]
        d_right = sum(end * x for end, x in zip(ends[1:], lefts[1:], strict=True))
        d_right = d_right + ends[0] * lefts[0]
        spans = jnp.zeros_like(right)
        i, t = row_indices(size), column_indices(size)
        for n, width in enumerate(powers_below(size)):
            upto, after = self.level(n)
            # For a pair that factorizes at the middle of a block, the left factor has the decays
            # from the middle to t, and the right factor those after j. Other steps do not enter.
            if width < GROUP:
                mask = _pairs_at(i, t, width)
                stacked = jnp.concatenate([jnp.where(mask, ct, 0.0) for ct in cts], axis=0)
                back = self.num.dot(stacked, _times(narrow, after), exact=exact)
                by_left = [upto * back[m * size : (m + 1) * size] for m in range(len(lefts))]
                left = jnp.concatenate([x * upto for x in lefts], axis=0)
                by_right = _times(self.num.dot(stacked, left, TN, exact), after)
                change = right * by_right
                change = sum((x * d for x, d in zip(lefts, by_left, strict=True)), change)
                d_lefts = [d + own for d, own in zip(d_lefts, by_left, strict=True)]
                d_right = d_right + by_right
            else:
                mask = _pairs_of_halves(size, width)
                stacked = jnp.concatenate(
                    [jnp.where(mask, _half(ct, width, 1), 0.0) for ct in cts], axis=0
                )
                assert after is not None
                left_decay, right_decay = _half(upto, width, 1), _half(after, width, 0)
                expand = functools.partial(_first_halves, width=width)
                back = self.num.dot(
                    stacked, _half(right, width, 0) * right_decay, exact=exact, expand=expand
                )
                half = size // 2
                by_left = [left_decay * back[m * half : (m + 1) * half] for m in range(len(lefts))]
                seconds = [_half(x, width, 1) for x in lefts]
                left = jnp.concatenate([x * left_decay for x in seconds], axis=0)
                full = self.num.dot(stacked, left, TN, exact)
                by_right = right_decay * _half(full, width, 0)
                later = [x * d for x, d in zip(seconds, by_left, strict=True)]
                earlier = _half(right, width, 0) * by_right
                change = _join(earlier, sum(later[1:], start=later[0]), width)
                d_lefts = [
                    _join(_half(d, width, 0), _half(d, width, 1) + own, width)
                    for d, own in zip(d_lefts, by_left, strict=True)
                ]
                first = _half(d_right, width, 0) + by_right
                d_right = _join(first, _half(d_right, width, 1), width)
            second = (t & width) > 0
            within = (second & (i <= t)) | (~second & (i > t))
            within = within & (block_index(i, width) == block_index(t, width))
            spans = spans + self.num.dot(self.num.ones(within), change, exact=True)
        return PairCotangents(d_lefts, d_right, spans)

    def _left(self, d: Any, x: jax.Array, state: jax.Array, exact: bool) -> jax.Array:
        return self.num.dot(x.astype(d.dtype) * d, state, exact=exact)

    def write(self, x: jax.Array, y: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the sum over t of D_{C,t} x_t y_t^T [K, V], from x [C, K] and y [C, V]."""
        return self.num.dot(x.astype(self.num.dtype) * self.after, y, TN, exact)

    def _right(self, d: Any, x: jax.Array, y: jax.Array, exact: bool) -> jax.Array:
        return self.num.dot(x.astype(d.dtype) * d, y, TN, exact)

    def carry(self, state: jax.Array) -> jax.Array:
        """Apply all decays of the chunk to a state."""
        return self.num.columns(self.upto[-1:], self.values) * state

    def decay_sums_back(
        self, pairs: jax.Array, reads: jax.Array, writes: jax.Array, last: jax.Array
    ) -> DecaySumCotangents:
        """Compute the cotangents of sums of g, [C, K] each; see `SharedDecay`."""
        ones = self.num.ones(row_indices(GROUP, last.shape[1]) >= 0)
        return DecaySumCotangents(
            pairs + self.num.dot(ones, last, NT, exact=True)[:1], reads, writes
        )
