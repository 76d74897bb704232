"""Products of small matrices, and index arrays, for the TPU kernels.

With float32 inputs every product has float32 accuracy. With bfloat16 inputs, factors are rounded to
bfloat16 and sums are float32. States, the triangular inverse and its right-hand side need more
accuracy (`exact`). Their float32 values are split into two bfloat16 numbers whose sum has 16
correct bits. Inputs in bfloat16 are never split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import pltpu

GROUP = 8  # sublanes of a register: permutations inside a group stay inside registers
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # a b, a b^T, a^T b


class Numerics(NamedTuple):
    """Accuracy of products.

    Attributes:
      dtype: dtype of sums.
      bfloat16_factors: whether factors are bfloat16 numbers.
    """

    dtype: Any
    bfloat16_factors: bool

    def dot(
        self,
        a: jax.Array,
        b: jax.Array,
        kind: Any = NN,
        exact: bool = False,
        expand: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Multiply two matrices; `exact` splits float32 factors instead of rounding them.

        With `expand` the second factor is `expand(b)`, which may only copy numbers or set them to
        zero. The split is then done before the expansion, on the smaller b.
        """
        dims = (kind, ((), ()))
        if not self.bfloat16_factors:
            a, b = a.astype(self.dtype), b.astype(self.dtype)
            b = b if expand is None else expand(b)
            return lax.dot_general(
                a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=self.dtype
            )
        lefts, rights = _split(a, exact), _split(b, exact, expand)
        total = None
        for i, left in reversed(list(enumerate(lefts))):  # the smallest first
            for j, right in reversed(list(enumerate(rights))):
                if i + j < max(len(lefts), len(rights)):
                    term = lax.dot_general(left, right, dims, preferred_element_type=self.dtype)
                    total = term if total is None else total + term
        assert total is not None
        return total

    def columns(self, row: jax.Array, width: int) -> jax.Array:
        """Copy a row [1, K] to all columns of [K, width], with all bits of its numbers."""
        index = row_indices(2 * GROUP, row.shape[1])
        stacked, rest = jnp.zeros(index.shape, self.dtype), row
        for n in range(3 if self.bfloat16_factors else 1):  # three parts of a float32 number
            part = _rounded(rest) if self.bfloat16_factors else rest
            stacked, rest = jnp.where(index == n, part, stacked), rest - part
        return self.dot(stacked, self.ones(row_indices(2 * GROUP, width) >= 0), TN)

    def ones(self, mask: jax.Array) -> jax.Array:
        """Convert a mask to a factor of a product, which is exact in any dtype."""
        return jnp.where(mask, 1.0, 0.0).astype(
            jnp.bfloat16 if self.bfloat16_factors else self.dtype
        )


def _split(
    x: jax.Array, exact: bool, expand: Callable[[jax.Array], jax.Array] | None = None
) -> list[jax.Array]:
    if x.dtype == jnp.bfloat16 or not exact:
        parts = [x]
    else:
        high = _rounded(x)
        parts = [high, x - high]
    if expand is not None:
        parts = [expand(part.astype(jnp.float32)) for part in parts]
    return [part.astype(jnp.bfloat16) for part in parts]


def _rounded(x: jax.Array) -> jax.Array:
    """Round float32 numbers to bfloat16, in float32.

    Rounding uses bit operations, because a compiler may drop a cast to bfloat16 and back.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(
        (bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000), jnp.float32
    )


def rows_down(x: jax.Array) -> jax.Array:
    """Move every row of a matrix down by one; the first becomes zero."""
    return _moved(x, 1, 0)


def rows_up(x: jax.Array) -> jax.Array:
    """Move every row of a matrix up by one; the last becomes zero."""
    return _moved(x, x.shape[0] - 1, x.shape[0] - 1)


def _moved(x: jax.Array, by: int, zero_row: int) -> jax.Array:
    wide = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # rotations are of 32-bit rows
    rotated = pltpu.roll(wide, by, axis=0)
    return jnp.where(row_indices(*x.shape) == zero_row, 0.0, rotated).astype(x.dtype)


def row_indices(size: int, columns: int | None = None) -> jax.Array:
    """Return the row index of every element of a [size, columns or size] matrix."""
    return lax.broadcasted_iota(jnp.int32, (size, columns or size), 0)


def column_indices(size: int, columns: int | None = None) -> jax.Array:
    """Return the column index of every element of a [size, columns or size] matrix."""
    return lax.broadcasted_iota(jnp.int32, (size, columns or size), 1)


def block_index(index: jax.Array, width: int) -> jax.Array:
    """Divide an index by a block width, a power of two.

    A shift, because the lowering of `//` depends on the chip, which is unknown ahead of time.
    """
    return lax.shift_right_logical(index, jnp.int32(width.bit_length() - 1))


def powers_below(size: int) -> list[int]:
    """Return 1, 2, 4, ..., the powers of two below `size`."""
    return [1 << n for n in range(size.bit_length() - 1)]
