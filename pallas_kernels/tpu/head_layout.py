"""Conversion between a block [1, C, H, F] of all heads and one matrix [C, F] per head.

H is the second axis of a tile, so a head is one sublane of each tile. Whole tiles of 32-bit numbers
are read with a stride, which is as fast as reading them in order. Two bfloat16 heads share a 32-bit
sublane, and shifts separate them. The compiler transposes other shapes, which is slower.
"""

from collections.abc import Callable, Generator
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


def split_heads(
    ref: Any,
    out: Any,
    dtype: Any,
    change: Callable[[int, jax.Array], jax.Array] | None = None,
    unchanged: Any = None,
) -> jax.Array:
    """Copy a block [1, C, H, F] to [H, C, F].

    Args:
      ref: the block.
      out: the scratch of the result.
      dtype: the dtype of sums.
      change: maps the index of a head and its matrix [C, F] to the matrix to store.
      unchanged: scratch for the matrices before `change`, or None.

    Returns:
      A scalar that is zero if all stored values are finite, and NaN if not.
    """
    _, size, heads, features = ref.shape

    def copy(head: int, x: jax.Array) -> jax.Array:
        if unchanged is not None:
            unchanged[head] = x.astype(unchanged.dtype)
        x = x.astype(dtype)
        x = x if change is None else change(head, x)
        out[head] = x.astype(out.dtype)
        return x * 0

    nonfinite: Any = jnp.zeros((size, features), dtype)
    if _strided(ref) and ref.dtype == jnp.float32:
        flat = ref.at[0].reshape(size * heads, features)
        for h in range(heads):
            nonfinite = nonfinite + copy(h, flat[pl.ds(h, size, heads), :])
    elif _strided(ref) and ref.dtype == jnp.bfloat16:
        flat = ref.at[0].bitcast(jnp.uint32).reshape(size * heads // 2, features)
        for h in range(0, heads, 2):
            pair = flat[pl.ds(h // 2, size, heads // 2), :]
            even_head, odd_head = pair << jnp.uint32(16), pair & jnp.uint32(0xFFFF0000)
            nonfinite = nonfinite + copy(h, lax.bitcast_convert_type(even_head, jnp.float32))
            nonfinite = nonfinite + copy(h + 1, lax.bitcast_convert_type(odd_head, jnp.float32))
    else:
        x = jnp.swapaxes(ref[0].astype(dtype), 0, 1)
        for h in range(heads):
            nonfinite = nonfinite + copy(h, x[h])
    return jnp.sum(nonfinite)


def flat_scratch(chunk: int, heads: int, widths: list[int]) -> tuple[int, int] | None:
    """Return the shape of the uint32 scratch of `join_heads`; None if no array has whole tiles."""
    whole_tiles = heads % SUBLANES == 0 and LANES in widths
    return (chunk * heads, LANES) if whole_tiles else None


def join_heads(ref: Any, out: Any, flat: Any) -> None:
    """Invert `split_heads`; `flat` is scratch of the shape from `flat_scratch`, or None."""
    _, size, heads, features = out.shape
    if _strided(out) and out.dtype == jnp.float32:
        for h in range(heads):
            flat[pl.ds(h, size, heads), :] = _bits(ref[h])
        words = lax.bitcast_convert_type(flat[...], jnp.float32)
        out[0] = words.reshape(size, heads, features)
    elif _strided(out) and out.dtype == jnp.bfloat16:
        for h in range(0, heads, 2):
            even_head, odd_head = (_bits(ref[n].astype(jnp.bfloat16)) for n in (h, h + 1))
            flat[pl.ds(h // 2, size, heads // 2), :] = (even_head >> jnp.uint32(16)) | odd_head
        words = pltpu.bitcast(flat[: size * heads // 2], jnp.bfloat16)
        out[0] = words.reshape(size, heads, features)
    else:
        wide = jnp.float32 if out.dtype == jnp.bfloat16 else out.dtype
        out[0] = jnp.swapaxes(ref[...].astype(wide), 0, 1).astype(out.dtype)


def interleave(heads: list[Generator[None, None, Any]]) -> list[Any]:
    """Run the generators of all heads in turns, from one `yield` to the next, to their results.

    A product has a long latency and a short issue time. The compiler keeps the order of the
    program. With the heads interleaved, no product directly follows the one that it depends on.
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


def backward_by_head(
    solve: Callable[..., list[Any]], head_backward: Callable[..., Generator[None, None, Any]]
) -> Callable[..., list[Any]]:
    """Return the adjoint computation of a chunk of all heads, for `ChunkRecurrence`.

    Args:
      solve: (num, decays, heads, states) -> the intermediate results of every head.
      head_backward: (num, scale, decays, inputs, state, d_out, d_state, results of `solve`) -> the
        cotangents of one head, in steps that are interleaved with those of other heads.
    """

    def backward(
        num: Any, decays: Any, heads: Any, states: Any, scale: float, d_outs: Any, d_states: Any
    ) -> list[Any]:
        solutions = solve(num, decays, heads, states)
        by_head = zip(decays, heads, states, d_outs, d_states, solutions, strict=True)
        return interleave([head_backward(num, scale, *head) for head in by_head])

    return backward
