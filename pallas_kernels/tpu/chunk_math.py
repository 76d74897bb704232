"""Mathematics of a chunk of C steps of a matrix-state recurrence, for one head at a time.

Arrays are [C, K], [C, V], [C, C] and states [K, V]. Blocks, grids and memory are in
`matrix_kernel`, and the accuracy of products in `numerics`.

The product of the decays between two steps is computed from a sum of only those logarithms,
or from products of halves. Sums are never subtracted, decays never divided, and no product exceeds
one. A decay of zero, or a reset, is a logarithm of -1e30.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.numerics import (
    NT,
    TN,
    Numerics,
    column_indices,
    row_indices,
    rows_down,
)

LOG_ZERO = -1e30  # exp of it is zero, and sums of a chunk of them are finite
CHUNK = 128  # steps in a chunk: the side of a matrix unit


def chunk_steps(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: Any,
    log_decay: Any,
    *vectors: jax.Array,
    wanted: int | None,
) -> int:
    """Return the steps in a chunk: a power of two, and whole tiles of the narrowest array.

    The default is 128. The inverse is larger than with 64, but products fill the matrix units, and
    states are read and written half as often. Wide keys or values and float32 decays per channel
    use more memory per step, and 128 steps would not fit the VMEM of a v5p.
    """
    arrays = [x for x in (q, k, v, beta, log_decay, *vectors) if x is not None]
    usual = CHUNK
    if log_decay is not None and log_decay.ndim == 4 and q.dtype != jnp.bfloat16:
        usual = CHUNK // 2
    if max(k.shape[-1], v.shape[-1]) > CHUNK:
        usual = CHUNK // 4
    least = 16 if any(x.dtype == jnp.bfloat16 for x in arrays) else 8
    return 1 << (max(least, min(wanted or usual, q.shape[1])) - 1).bit_length()


def transposed(g: jax.Array, num: Numerics) -> jax.Array:
    """Transpose [C, H] to [H, C], by a product with the identity."""
    size = g.shape[0]
    return num.dot(g, num.ones(row_indices(size) == column_indices(size)), TN, exact=True)


class HeadDecays(NamedTuple):
    """Decays per head, for all heads of a block, which share a few products.

    Attributes:
      row: g^T [H, C].
      upto: exp(g_1 + ... + g_t) [C, H].
      after: exp(g_{t+1} + ... + g_C) [C, H].
    """

    row: jax.Array
    upto: jax.Array
    after: jax.Array


def head_decays(g: jax.Array, num: Numerics) -> HeadDecays:
    """Compute the decays per head from finite logarithms [C, H]."""
    size = g.shape[0]
    t, i = row_indices(size), column_indices(size)
    upto = num.dot(num.ones(i <= t), g, exact=True)
    after = num.dot(num.ones(i > t), g, exact=True)
    return HeadDecays(transposed(g, num), jnp.exp(upto), jnp.exp(after))


class PairCotangents(NamedTuple):
    """Cotangents of the left factors, the right factor and g, from the cotangents of `pairs`."""

    lefts: list[jax.Array]
    right: jax.Array
    decays: jax.Array


class DecaySumCotangents(NamedTuple):
    """Cotangents of sums of g [C, 1 or K].

    Attributes:
      single: cotangent of g_t.
      reads: cotangent of g_1 + ... + g_t.
      writes: cotangent of g_{t+1} + ... + g_C.
    """

    single: jax.Array
    reads: jax.Array
    writes: jax.Array


class SharedDecay:
    """A decay that is equal for all channels, or no decay: a factor outside of every product.

    `pairs` computes P[t, j] = left_t^T D_{t,j} right_j for j <= t, where D_{t,j} are the decays of
    the steps after j and up to t. `read` computes D_{t,0} x_t S, and `write` the sum over t of
    D_{C,t} x_t y_t^T.
    """

    def __init__(self, num: Numerics, size: int, values: HeadDecays | None, head: int) -> None:
        """Select the decays of one head; no decay if `values` is None."""
        self.num = num
        self.lower = row_indices(size) >= column_indices(size)
        self.factor: Any = None
        self.upto: Any = None
        self.after: Any = None
        if values is None:
            return
        head = head if values.upto.shape[1] > 1 else 0
        t, i = row_indices(size), column_indices(size)
        g = values.row[head : head + 1]
        sums = num.dot(jnp.where(i <= t, g, 0.0), num.ones(t > i), exact=True)
        self.factor = jnp.where(self.lower, jnp.exp(sums), 0.0)
        self.upto, self.after = (x[:, head : head + 1] for x in (values.upto, values.after))

    def _masked(self, p: jax.Array) -> jax.Array:
        return jnp.where(self.lower, p, 0.0) if self.factor is None else p * self.factor

    def pairs(self, lefts: list[jax.Array], right: jax.Array) -> list[jax.Array]:
        """Compute P [C, C] for every left factor."""
        return self.pairs_with(lefts, [right])[0]

    def pairs_with(self, lefts: list[jax.Array], rights: list[jax.Array]) -> list[list[jax.Array]]:
        """Compute P [C, C] for every right factor and every left factor."""
        products = self._products(jnp.concatenate(lefts, axis=0), jnp.concatenate(rights, axis=0))
        return [[self._masked(p) for p in by_left] for by_left in products]

    def _products(
        self, lefts: jax.Array, rights: jax.Array, exact: bool = False
    ) -> list[list[jax.Array]]:
        """Multiply stacked factors; return the blocks [C, C] of every right and left factor."""
        size = self.lower.shape[0]
        stacked = self.num.dot(lefts, rights, NT, exact)
        rows, columns = (range(0, n, size) for n in stacked.shape)
        return [[stacked[i : i + size, j : j + size] for i in rows] for j in columns]

    def pairs_back(
        self,
        cts: list[jax.Array],
        lefts: list[jax.Array],
        right: jax.Array,
        pairs: list[jax.Array],
        exact: bool = False,
    ) -> PairCotangents:
        """Compute the cotangents of the factors and of g from those of P, which is `pairs`."""
        stacked = jnp.concatenate([self._masked(ct) for ct in cts], axis=0)
        size = right.shape[0]
        d_lefts = self.num.dot(stacked, right, exact=exact)
        d_right = self.num.dot(stacked, jnp.concatenate(lefts, axis=0), TN, exact)
        by_left = [d_lefts[n * size : (n + 1) * size] for n in range(len(lefts))]
        # The decay of step i is in the pairs with j < i <= t: sum over t, then over j.
        i, j = row_indices(size), column_indices(size)
        change = sum((ct * p for ct, p in zip(cts[1:], pairs[1:], strict=True)), cts[0] * pairs[0])
        change = self.num.dot(self.num.ones(j >= i), jnp.where(i > j, change, 0.0), exact=True)
        spans = jnp.sum(jnp.where(i > j, change, 0.0), axis=1, keepdims=True)
        return PairCotangents(by_left, d_right, spans)

    def _left(self, d: Any, x: jax.Array, state: jax.Array, exact: bool) -> jax.Array:
        product = self.num.dot(x, state, exact=exact)
        return product if d is None else d * product

    def read(self, x: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """Compute D_{t,0} x_t S [C, V], from x [C, K]."""
        return self._left(self.upto, x, state, exact)

    @property
    def before(self) -> Any:
        """The decays up to the previous step: one for the first step of the chunk."""
        if self.upto is None:
            return None
        first = row_indices(*self.upto.shape) == 0
        return jnp.where(first, 1.0, rows_down(self.upto))

    def read_before(self, x: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """Compute D_{t-1,0} x_t S [C, V], the read before the decay of the step."""
        return self._left(self.before, x, state, exact)

    def write(self, x: jax.Array, y: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the sum over t of D_{C,t} x_t y_t^T [K, V], from x [C, K] and y [C, V]."""
        if self.after is not None:
            y = self.after * y.astype(self.after.dtype)
        return self.num.dot(x, y, TN, exact)

    def read_back(self, ct: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of x in `read`."""
        product = self.num.dot(ct, state, NT, exact)
        return product if self.upto is None else self.upto * product

    def read_before_back(self, ct: jax.Array, state: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of x in `read_before`."""
        product = self.num.dot(ct, state, NT, exact)
        return product if self.before is None else self.before * product

    def read_back_state(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of the state in `read`."""
        return self._right(self.upto, x, ct, exact)

    def read_before_back_state(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of the state in `read_before`."""
        return self._right(self.before, x, ct, exact)

    def _right(self, d: Any, x: jax.Array, y: jax.Array, exact: bool) -> jax.Array:
        return self.num.dot(x, y if d is None else d * y, TN, exact)

    def write_back(self, y: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of x in `write`."""
        product = self.num.dot(y, ct, NT, exact)
        return product if self.after is None else self.after * product

    def write_back_values(self, x: jax.Array, ct: jax.Array, exact: bool = False) -> jax.Array:
        """Compute the cotangent of y in `write`."""
        return self._left(self.after, x, ct, exact)

    def carry(self, state: jax.Array) -> jax.Array:
        """Apply all decays of the chunk to a state."""
        return state if self.upto is None else self.upto[-1:] * state

    def decay_sums_back(
        self, pairs: jax.Array, reads: jax.Array, writes: jax.Array, last: jax.Array
    ) -> DecaySumCotangents:
        """Compute the cotangents of sums of g, for `decay_gradient`.

        Args:
          pairs: cotangents of g from `pairs_back`, [C, 1].
          reads: x times its cotangent in `read`, [C, K].
          writes: x times its cotangent in `write`, [C, K].
          last: the decayed state times its cotangent, [K, V].
        """
        reads, writes = (jnp.sum(x, axis=1, keepdims=True) for x in (reads, writes))
        return DecaySumCotangents(pairs + jnp.sum(last), reads, writes)


def decay_gradient(back: DecaySumCotangents, num: Numerics) -> jax.Array:
    """Compute the cotangents of g from the cotangents of sums of g.

    The decay of step i multiplies the value that step t reads if i <= t, and the value that step j
    writes if j < i. No term enters with both signs. The gradient of a strong decay is far smaller
    than such terms, so that their rounding errors would replace it.
    """
    size = back.reads.shape[0]
    i, step = row_indices(size, 2 * size), column_indices(size, 2 * size)
    band = (i <= step) & (step < i + size)
    both = jnp.concatenate([back.reads, back.writes], axis=0)
    return back.single + num.dot(num.ones(band), both, exact=True)
