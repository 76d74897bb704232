"""Heads in and out of a block [1, C, H, F]: each a matrix [C, F] of its own.

H is the second axis of a tile, so a head is one sublane in each. Whole tiles of 32-bit numbers are
read with a stride, which is as fast as reading them in order; two bfloat16 heads share a 32-bit
sublane and are taken apart by shifts. Other shapes are transposed by the compiler, more slowly.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import pl

LANES, SUBLANES = 128, 8


def _strided(ref: Any) -> bool:
    _, _, heads, features = ref.shape
    return heads % SUBLANES == 0 and features % LANES == 0


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def split_heads(ref: Any, out: Any, dtype: Any, low: float | None = None) -> jax.Array:
    """Copy a block [1, C, H, F] to [H, C, F], what is below `low` raised to it.

    Returns:
      a scalar that is zero if all is finite, and NaN if not.
    """
    _, size, heads, features = ref.shape

    def put(head: int, x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        x = x if low is None else jnp.where(x < low, low, x)
        out[head] = x.astype(out.dtype)
        return x * 0

    odd: Any = jnp.zeros((size, features), dtype)
    if _strided(ref) and ref.dtype == jnp.float32:
        flat = ref.at[0].reshape(size * heads, features)
        for h in range(heads):
            odd = odd + put(h, flat[pl.ds(h, size, heads), :])
    elif _strided(ref) and ref.dtype == jnp.bfloat16:
        flat = ref.at[0].bitcast(jnp.uint32).reshape(size * heads // 2, features)
        for h in range(0, heads, 2):
            pair = flat[pl.ds(h // 2, size, heads // 2), :]
            even, other = pair << jnp.uint32(16), pair & jnp.uint32(0xFFFF0000)
            odd = odd + put(h, lax.bitcast_convert_type(even, jnp.float32))
            odd = odd + put(h + 1, lax.bitcast_convert_type(other, jnp.float32))
    else:
        x = jnp.swapaxes(ref[0].astype(dtype), 0, 1)
        for h in range(heads):
            odd = odd + put(h, x[h])
    return jnp.sum(odd)


def join_heads(ref: Any, out: Any) -> None:
    """The inverse of `split_heads`."""
    _, size, heads, features = out.shape
    if _strided(out) and out.dtype == jnp.float32:
        flat = out.at[0].reshape(size * heads, features)
        for h in range(heads):
            flat[pl.ds(h, size, heads), :] = ref[h].astype(jnp.float32)
    elif _strided(out) and out.dtype == jnp.bfloat16:
        flat = out.at[0].bitcast(jnp.uint32).reshape(size * heads // 2, features)
        for h in range(0, heads, 2):
            even, other = (_bits(ref[n].astype(jnp.bfloat16)) for n in (h, h + 1))
            flat[pl.ds(h // 2, size, heads // 2), :] = (even >> jnp.uint32(16)) | other
    else:
        wide = jnp.float32 if out.dtype == jnp.bfloat16 else out.dtype
        out[0] = jnp.swapaxes(ref[...].astype(wide), 0, 1).astype(out.dtype)
