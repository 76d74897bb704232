"""Heads in and out of a block [1, C, H, F]: each a matrix [C, F] of its own.

H is the second axis of a tile, so a head is one sublane in each. Whole tiles of 32-bit numbers are
read with a stride, which is as fast as reading them in order; two bfloat16 heads share a 32-bit
sublane and are taken apart by shifts. Other shapes are transposed by the compiler, more slowly.
"""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import pl, pltpu

LANES, SUBLANES = 128, 8


def _strided(ref: Any) -> bool:
    _, _, heads, features = ref.shape
    return heads % SUBLANES == 0 and features == LANES


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


def flat_scratch(chunk: int, heads: int, widths: list[int]) -> tuple[int, int] | None:
    """The shape of what `join_heads` needs to write whole tiles, uint32; None if there are none."""
    whole = heads % SUBLANES == 0 and LANES in widths
    return (chunk * heads, LANES) if whole else None


def join_heads(ref: Any, out: Any, flat: Any) -> None:
    """The inverse of `split_heads`; `flat` as `flat_scratch` says, or None."""
    _, size, heads, features = out.shape
    if _strided(out) and out.dtype == jnp.float32:
        for h in range(heads):
            flat[pl.ds(h, size, heads), :] = _bits(ref[h])
        words = lax.bitcast_convert_type(flat[...], jnp.float32)
        out[0] = words.reshape(size, heads, features)
    elif _strided(out) and out.dtype == jnp.bfloat16:
        for h in range(0, heads, 2):
            even, other = (_bits(ref[n].astype(jnp.bfloat16)) for n in (h, h + 1))
            flat[pl.ds(h // 2, size, heads // 2), :] = (even >> jnp.uint32(16)) | other
        words = pltpu.bitcast(flat[: size * heads // 2], jnp.bfloat16)
        out[0] = words.reshape(size, heads, features)
    else:
        wide = jnp.float32 if out.dtype == jnp.bfloat16 else out.dtype
        out[0] = jnp.swapaxes(ref[...].astype(wide), 0, 1).astype(out.dtype)


def in_step(heads: list[Generator[None, None, Any]]) -> list[Any]:
    """What generators return, one for each head, all of them going from `yield` to `yield` at once.

    A product takes long to come and little to start. In the order in which a program is written
    the heads take turns, so that none waits for its own last product.
    """
    results: list[Any] = [None] * len(heads)
    running = dict(enumerate(heads))
    while running:
        for n, head in list(running.items()):
            try:
                next(head)
            except StopIteration as stop:
                results[n] = stop.value
                del running[n]
    return results
