"""The mathematics of a chunk of C steps of a matrix-state recurrence, for one head at a time.

Arrays are [C, K], [C, V], [C, C] and states [K, V]; nothing here knows of blocks, grids or memory.

Products. With float32 inputs every product has float32 accuracy. With bfloat16 inputs factors are
rounded to bfloat16 and sums are float32, and where that is not enough (`exact`) a float32 factor
is split into two bfloat16 numbers whose sum has 16 correct bits: states, the triangular inverse
and what it is applied to. What arrives in bfloat16 is never split.

Decays. Every product of decays between two steps is made by itself, from a sum of just those
logarithms or from products of halves: no differences of sums, nothing is divided, nothing exceeds
one. A decay of zero, and a reset with it, is a logarithm of -1e30.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG_ZERO = -1e30  # exp of it is zero, and sums of a chunk of them are finite
GROUP = 8  # the sublanes of a register: what is shuffled inside a group stays inside registers

CHUNK = 128  # steps in a chunk: the side of a matrix unit

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # a b, a b^T, a^T b


def chunk_steps(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: Any, log_decay: Any, *, wanted: int | None
) -> int:
    """Steps in a chunk: a power of two, and whole tiles of the narrowest of the arrays.

    128 unless `wanted`: the inverse grows, but products fill the matrix units and states are read
    and written half as often as with 64. Where more is kept for every step, wide keys or values or
    float32 decays per channel, 128 would not fit the memory of a v5p.
    """
    arrays = [x for x in (q, k, v, beta, log_decay) if x is not None]
    usual = CHUNK
    if log_decay is not None and log_decay.ndim == 4 and q.dtype != jnp.bfloat16:
        usual = CHUNK // 2
    if max(k.shape[-1], v.shape[-1]) > CHUNK:
        usual = CHUNK // 4
    least = 16 if any(x.dtype == jnp.bfloat16 for x in arrays) else 8
    return 1 << (max(least, min(wanted or usual, q.shape[1])) - 1).bit_length()


class Numerics(NamedTuple):
    """How products are made: of bfloat16 numbers if `narrow`; `dtype` is that of sums."""

    dtype: Any
    narrow: bool

    def dot(self, a: jax.Array, b: jax.Array, kind: Any = NN, exact: bool = False) -> jax.Array:
        """A product of two matrices; `exact` if more than bfloat16 factors are needed."""
        dims = (kind, ((), ()))
        if not self.narrow:
            a, b = a.astype(self.dtype), b.astype(self.dtype)
            return lax.dot_general(
                a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=self.dtype
            )
        lefts, rights = _split(a, exact), _split(b, exact)
        total = None
        for i, left in reversed(list(enumerate(lefts))):  # the smallest first
            for j, right in reversed(list(enumerate(rights))):
                if i + j < max(len(lefts), len(rights)):
                    term = lax.dot_general(left, right, dims, preferred_element_type=self.dtype)
                    total = term if total is None else total + term
        assert total is not None
        return total

    def ones(self, mask: jax.Array) -> jax.Array:
        """A mask as a factor of a product: exact in any dtype."""
        return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16 if self.narrow else self.dtype)


def _split(x: jax.Array, exact: bool) -> list[jax.Array]:
    if x.dtype == jnp.bfloat16:
        return [x]
    if not exact:
        return [x.astype(jnp.bfloat16)]
    # By its bits: a compiler may drop a cast to bfloat16 and back.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    high = lax.bitcast_convert_type(
        (bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    return [high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)]


def rows(size: int, columns: int | None = None) -> jax.Array:
    """The row of every element of a [size, columns or size] matrix."""
    return lax.broadcasted_iota(jnp.int32, (size, columns or size), 0)


def cols(size: int, columns: int | None = None) -> jax.Array:
    """The column of every element of a [size, columns or size] matrix."""
    return lax.broadcasted_iota(jnp.int32, (size, columns or size), 1)


def block_of(index: jax.Array, width: int) -> jax.Array:
    """In which block of so many, a power of two. A shift: `//` would ask for the chip's name."""
    return lax.shift_right_logical(index, jnp.int32(width.bit_length() - 1))


def transposed(g: jax.Array, num: Numerics) -> jax.Array:
    """[C, H] -> [H, C], by a product with the identity."""
    size = g.shape[0]
    return num.dot(g, num.ones(rows(size) == cols(size)), TN, exact=True)


class Scalars(NamedTuple):
    """Decays per head, for all heads of a block: what is a handful of products for all of them."""

    row: jax.Array  # g^T [H, C]
    upto: jax.Array  # exp(g_1 + ... + g_t) [C, H]
    after: jax.Array  # exp(g_{t+1} + ... + g_C) [C, H]


def scalars(g: jax.Array, num: Numerics) -> Scalars:
    """From clean logarithms [C, H]."""
    size = g.shape[0]
    t, i = rows(size), cols(size)
    upto = num.dot(num.ones(i <= t), g, exact=True)
    after = num.dot(num.ones(i > t), g, exact=True)
    return Scalars(transposed(g, num), jnp.exp(upto), jnp.exp(after))


class PairsBack(NamedTuple):
    """The cotangents of the lefts, of the right and of g, from the cotangents of `pairs`."""

    lefts: list[jax.Array]
    right: jax.Array
    decays: jax.Array


class SpansBack(NamedTuple):
    """The cotangents of sums of g [C, 1 or K], by the steps in the sums."""

    through: jax.Array  # of g itself
    reads: jax.Array  # of g_1 + ... + g_t
    writes: jax.Array  # of g_{t+1} + ... + g_C


class Shared:
    """One decay for all channels, or none: it comes out of every product.

    `pairs` makes P[t, j] = left_t^T D_{t,j} right_j for j <= t, D_{t,j} the decays of the steps
    after j and up to t; `read` makes D_{t,0} x_t S and `write` sum_t D_{C,t} x_t y_t^T.
    """

    def __init__(self, num: Numerics, size: int, values: Scalars | None, head: int) -> None:
        """Of one head among `values`, or no decay if there are none."""
        self.num = num
        self.lower = rows(size) >= cols(size)
        self.factor: Any = None
        self.upto: Any = None
        self.after: Any = None
        if values is None:
            return
        head = head if values.upto.shape[1] > 1 else 0
        t, i = rows(size), cols(size)
        g = values.row[head : head + 1]
        sums = num.dot(jnp.where(i <= t, g, 0.0), num.ones(t > i), exact=True)
        self.factor = jnp.where(self.lower, jnp.exp(sums), 0.0)
        self.upto, self.after = (x[:, head : head + 1] for x in (values.upto, values.after))

    def _masked(self, p: jax.Array) -> jax.Array:
        return jnp.where(self.lower, p, 0.0) if self.factor is None else p * self.factor

    def pairs(self, lefts: list[jax.Array], right: jax.Array) -> list[jax.Array]:
        """P of every left [C, C]."""
        size = right.shape[0]
        made = self.num.dot(jnp.concatenate(lefts, axis=0), right, NT)
        return [self._masked(made[n * size : (n + 1) * size]) for n in range(len(lefts))]

    def pairs_back(
        self,
        cts: list[jax.Array],
        lefts: list[jax.Array],
        right: jax.Array,
        pairs: list[jax.Array],
        exact: bool = False,
    ) -> PairsBack:
        """Pull the cotangents of P, which is `pairs`, back to its factors and decays."""
        made = jnp.concatenate([self._masked(ct) for ct in cts], axis=0)
        size = right.shape[0]
        d_lefts = self.num.dot(made, right, exact=exact)
        d_right = self.num.dot(made, jnp.concatenate(lefts, axis=0), TN, exact)
        by_left = [d_lefts[n * size : (n + 1) * size] for n in range(len(lefts))]
        # The decay of step i is in the pairs with j < i <= t: sum over t, then over j.
        i, j = rows(size), cols(size)
        change = sum((ct * p for ct, p in zip(cts[1:], pairs[1:], strict=True)), cts[0] * pairs[0])
        change = self.num.dot(self.num.ones(j >= i), jnp.where(i > j, change, 0.0), exact=True)
        spans = jnp.sum(jnp.where(i > j, change, 0.0), axis=1, keepdims=True)
        return PairsBack(by_left, d_right, spans)

    def _left(self, d: Any, x: jax.Array, state: jax.Array, exact: bool) -> jax.Array:
        made = self.num.dot(x, state, exact=exact)
        return made if d is None else d * made

    def read(self, x: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """[C, V], from x [C, K]."""
        return self._left(self.upto, x, state, exact)

    def write(self, x: jax.Array, y: jax.Array, exact: bool = False) -> jax.Array:
        """[K, V], from x [C, K] and y [C, V]."""
        if self.after is not None:
            y = self.after * y.astype(self.after.dtype)
        return self.num.dot(x, y, TN, exact)

    def read_back(self, ct: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """The cotangent of x in `read`."""
        made = self.num.dot(ct, state, NT, exact)
        return made if self.upto is None else self.upto * made

    def read_back_state(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """The cotangent of the state in `read`."""
        return self.num.dot(x, ct if self.upto is None else self.upto * ct, TN, exact)

    def write_back(self, y: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """The cotangent of x in `write`."""
        made = self.num.dot(y, ct, NT, exact)
        return made if self.after is None else self.after * made

    def write_back_values(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """The cotangent of y in `write`."""
        return self._left(self.after, x, ct, exact)

    def carry(self, state: jax.Array) -> jax.Array:
        """The state after all decays of the chunk."""
        return state if self.upto is None else self.upto[-1:] * state

    def spans_back(
        self, pairs: jax.Array, reads: jax.Array, writes: jax.Array, last: jax.Array
    ) -> SpansBack:
        """Collect what changes with the decays, for `decay_gradient`.

        Args:
          pairs: the cotangents of g from `pairs_back`, [C, 1].
          reads: x times its cotangent in `read`, [C, K].
          writes: x times its cotangent in `write`, [C, K].
          last: the decayed state times its cotangent, [K, V].
        """
        reads, writes = (jnp.sum(x, axis=1, keepdims=True) for x in (reads, writes))
        return SpansBack(pairs + jnp.sum(last), reads, writes)


def _broadcast_row(x: jax.Array, width: int, at: int) -> jax.Array:
    """In blocks of `width` rows of x [C, K], row `at` of each, in all of its rows."""
    size, channels = x.shape
    unit = max(GROUP, width)
    blocks = x.reshape(size // unit, unit, channels)
    made = None
    place = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    for start in range(0, unit, width):
        row = jnp.broadcast_to(blocks[:, start + at : start + at + 1], blocks.shape)
        made = row if made is None else jnp.where(place >= start, row, made)
    assert made is not None
    return made.reshape(size, channels)


def widths(size: int) -> list[int]:
    """Return 1, 2, 4, ..., the powers of two below `size`."""
    return [1 << n for n in range(size.bit_length() - 1)]


class Channels(Shared):
    """Decays per channel, from clean logarithms g [C, K].

    They factorise at any step between j and t. For every t and j < t there is one width at which
    j is in the first and t in the second half of the same block: the middle is such a step.
    """

    def __init__(self, num: Numerics, g: jax.Array, values: int) -> None:
        """Of one head, with states [K, values]."""
        self.num = num
        size = g.shape[0]
        t, j = rows(size), cols(size)
        self.lower = t >= j
        self.met = [
            (block_of(t, 2 * w) == block_of(j, 2 * w)) & (block_of(t, w) > block_of(j, w))
            for w in widths(size)
        ]
        upto, after = jnp.exp(g), jnp.ones_like(g)
        self.levels = []
        step = rows(*g.shape)
        for width in widths(size):
            self.levels.append((upto, after))
            second = (step & width) > 0
            first_end = _broadcast_row(upto, 2 * width, width - 1)
            second_end = _broadcast_row(upto, 2 * width, 2 * width - 1)
            after = jnp.where(second, after, after * second_end)
            upto = jnp.where(second, first_end * upto, upto)
        self.upto, self.after = upto, after
        ones = num.ones(rows(size, values) >= 0)
        self.total = jnp.exp(num.dot(g, ones, TN, exact=True))

    def pairs(self, lefts: list[jax.Array], right: jax.Array) -> list[jax.Array]:
        """P of every left [C, C]."""
        size, count = right.shape[0], len(lefts)
        both = jnp.concatenate(lefts, axis=0)
        diagonal = rows(size) == cols(size)
        own = self.num.dot(both, right, NT)
        made = [jnp.where(diagonal, own[n * size : (n + 1) * size], 0.0) for n in range(count)]
        for met, (upto, after) in zip(self.met, self.levels, strict=True):
            left = jnp.concatenate([x.astype(upto.dtype) * upto for x in lefts], axis=0)
            pair = self.num.dot(left, right.astype(after.dtype) * after, NT, exact=True)
            made = [jnp.where(met, pair[n * size : (n + 1) * size], p) for n, p in enumerate(made)]
        return made

    def pairs_back(
        self,
        cts: list[jax.Array],
        lefts: list[jax.Array],
        right: jax.Array,
        pairs: list[jax.Array],
        exact: bool = False,
    ) -> PairsBack:
        """Pull the cotangents of P back to its factors and decays; see `Shared`."""
        del pairs
        size = right.shape[0]
        lefts, right = [x.astype(self.num.dtype) for x in lefts], right.astype(self.num.dtype)
        diagonal = rows(size) == cols(size)
        ends = [jnp.sum(jnp.where(diagonal, ct, 0.0), axis=1, keepdims=True) for ct in cts]
        d_lefts = [end * right for end in ends]
        d_right = sum(end * x for end, x in zip(ends[1:], lefts[1:], strict=True))
        d_right = d_right + ends[0] * lefts[0]
        spans = jnp.zeros_like(right)
        i, t = rows(size), cols(size)
        for width, met, (upto, after) in zip(widths(size), self.met, self.levels, strict=True):
            made = jnp.concatenate([jnp.where(met, ct, 0.0) for ct in cts], axis=0)
            back = self.num.dot(made, right * after, exact=exact)
            by_left = [upto * back[n * size : (n + 1) * size] for n in range(len(lefts))]
            left = jnp.concatenate([x * upto for x in lefts], axis=0)
            by_right = after * self.num.dot(made, left, TN, exact)
            # Of a pair that meets in the middle of a block, the decays from the middle to t enter
            # by the left, the decays after j by the right. Every other step stays out of the sum.
            change = right * by_right
            change = sum((x * d for x, d in zip(lefts, by_left, strict=True)), change)
            second = (t & width) > 0
            within = (second & (i <= t)) | (~second & (i > t))
            within = within & (block_of(i, width) == block_of(t, width))
            spans = spans + self.num.dot(self.num.ones(within), change, exact=True)
            d_lefts = [d + own for d, own in zip(d_lefts, by_left, strict=True)]
            d_right = d_right + by_right
        return PairsBack(d_lefts, d_right, spans)

    def _left(self, d: Any, x: jax.Array, state: jax.Array, exact: bool) -> jax.Array:
        return self.num.dot(x.astype(d.dtype) * d, state, exact=exact)

    def write(self, x: jax.Array, y: jax.Array, exact: bool = False) -> jax.Array:
        """[K, V], from x [C, K] and y [C, V]."""
        return self.num.dot(x.astype(self.num.dtype) * self.after, y, TN, exact)

    def read_back_state(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """The cotangent of the state in `read`."""
        return self.num.dot(x.astype(self.num.dtype) * self.upto, ct, TN, exact)

    def carry(self, state: jax.Array) -> jax.Array:
        """The state after all decays of the chunk."""
        return self.total * state

    def spans_back(
        self, pairs: jax.Array, reads: jax.Array, writes: jax.Array, last: jax.Array
    ) -> SpansBack:
        """Collect what changes with the decays, [C, K] each; see `Shared`."""
        ones = self.num.ones(rows(GROUP, last.shape[1]) >= 0)
        return SpansBack(pairs + self.num.dot(ones, last, NT, exact=True)[:1], reads, writes)


def decay_gradient(back: SpansBack, num: Numerics) -> jax.Array:
    """Return the cotangents of g: of every sum of g, those of the steps that are in it.

    Step i is in what step t reads of the entering state if i <= t, and in what step j writes to the
    leaving one if j < i. No term enters with both signs: the gradient of a strong decay is
    far smaller than what would have to cancel.
    """
    size = back.reads.shape[0]
    i, step = rows(size, 2 * size), cols(size, 2 * size)
    band = (i <= step) & (step < i + size)
    both = jnp.concatenate([back.reads, back.writes], axis=0)
    return back.through + num.dot(num.ones(band), both, exact=True)
