"""Products of decays over blocks of 1, 2, 4, ... steps, and over all steps between two steps.

See `decays`. Without decays, events are resets: True where the state is reset before the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.ops.core.linalg import down_columns, matmul


def decay_of(g: jax.Array) -> jax.Array:
    """Return exp(g), and zero where the real part of g is -inf."""
    low = jnp.isneginf(jnp.real(g))
    return jnp.where(low, jnp.zeros_like(g), jnp.exp(jnp.where(low, jnp.zeros_like(g), g)))


def block_decays(g: jax.Array, repeat: bool) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return products of the decays a_i = exp(g_i) in blocks of 1, 2, 4, ..., C steps.

    C is a power of two. The two lists hold arrays [..., C, K]. upto[n][t] is the product from the
    start of t's block of 2^n steps to t. after[n][j] is the product from j + 1 to the end of j's
    block. Each step and channel takes one exponential.

    With `repeat` a level multiplies by the products of the other half blocks, repeated for all
    steps. GPUs then compute a level where it is needed and store none. CPUs are three times slower
    that way, and join the halves.
    """
    upto, after = [decay_of(g)], [jnp.ones_like(g)]
    whole = upto[0]  # products of whole blocks
    for width in widths(1, g.shape[-2]):
        if not repeat:
            first, second = halves(upto[-1], width)
            left, right = halves(after[-1], width)
            upto.append(join(first, first[..., -1:, :] * second, g.shape))
            after.append(join(left * second[..., -1:, :], right, g.shape))
            continue
        pairs = _in_pairs(whole)
        other, second = jnp.flip(pairs, axis=-2), jnp.array([[False], [True]])
        one = jnp.ones_like(other)
        upto.append(upto[-1] * _repeat(jnp.where(second, other, one), width, g.shape))
        after.append(after[-1] * _repeat(jnp.where(second, one, other), width, g.shape))
        whole = pairs[..., 0, :] * pairs[..., 1, :]
    return upto, after


def _in_pairs(x: jax.Array) -> jax.Array:
    """Return blocks in pairs: [..., n, K] -> [..., n / 2, 2, K]."""
    return x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])


@jax.custom_jvp
def whole_block(g: jax.Array) -> jax.Array:
    """Return the product of the decays exp(g) of all steps: [..., C, K] -> [..., 1, K]."""
    whole = decay_of(g)
    for _ in widths(1, g.shape[-2]):
        pairs = _in_pairs(whole)
        whole = pairs[..., 0, :] * pairs[..., 1, :]
    return whole


@whole_block.defjvp
def _whole_block_jvp(primals: Any, tangents: Any) -> Any:
    whole = whole_block(*primals)
    return whole, whole * jnp.sum(tangents[0], axis=-2, keepdims=True)


def _repeat(x: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """Repeat the elements of pairs of blocks [..., 2, K] for all steps: [..., C, K]."""
    x = x[..., None, :]
    return jnp.broadcast_to(x, (*x.shape[:-2], width, x.shape[-1])).reshape(shape)


def halves(x: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Return the halves of blocks of 2 * width steps: two arrays [..., blocks, width, K]."""
    blocks = x.reshape(*x.shape[:-2], -1, 2, width, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def join(first: jax.Array, second: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Invert `halves`: return an array of this shape."""
    return jnp.concatenate([first, second], axis=-2).reshape(shape)


def count_events(events: jax.Array) -> jax.Array:
    """Count the events at or before each step; counts are equal where no event lies between.

    With 64-bit types enabled the counts have 64 bits. A loop over 8 float64 numbers that compares
    32-bit counts aborts the process on CPUs with AVX-512: the compiler of jaxlib 0.10.2 "cannot
    select" the instruction for its pairs of counts.
    """
    return jnp.cumsum(events, axis=-1, dtype=int)


def same_segment(events: jax.Array) -> jax.Array:
    """Return for steps t, j whether j <= t and no event lies in j+1..t: [..., C] -> [..., C, C]."""
    count, (t, j) = count_events(events), order(events.shape[-1])
    return (count[..., :, None] == count[..., None, :]) & (j <= t)


def between(g: jax.Array, *, by_level: bool = False) -> jax.Array:
    """Return a_{j+1} ... a_t for j <= t, else 0; a = exp(g): [..., C] -> [..., C, C].

    By default every sum of g is computed separately, as a product with zeros and ones. With
    `by_level`, the results are products of two `block_decays`. GPUs then compute an element where
    it is needed and store none. Only the form for bfloat16 on accelerators uses it.
    """
    if by_level:
        return _between_by_level(g)
    none = jnp.isneginf(jnp.real(g))
    sums = _sums_between(jnp.where(none, jnp.zeros_like(g), g))
    return jnp.where(same_segment(none), jnp.exp(sums), 0)


def _sums_between(g: jax.Array) -> jax.Array:
    """Return g_{j+1} + ... + g_t: [..., C] -> [..., C, C]."""
    size = g.shape[-1]
    t, i = order(size)
    upto = jnp.where(i <= t, down_columns(g, size), 0)
    return matmul(upto, jnp.broadcast_to((t > i).astype(g.dtype), upto.shape))


@jax.custom_jvp
def _between_by_level(g: jax.Array) -> jax.Array:
    size, (t, j) = g.shape[-1], order(g.shape[-1])
    upto, after = block_decays(g[..., None], repeat=True)
    made = jnp.broadcast_to((t == j).astype(g.dtype), (*g.shape, size))
    for level, width in enumerate(widths(1, size)):
        # t is in the second half of a block of 2 * width steps, and j in the first.
        met = (t // (2 * width) == j // (2 * width)) & (t // width > j // width)
        made = jnp.where(met, upto[level] * jnp.swapaxes(after[level], -2, -1), made)
    return made


@_between_by_level.defjvp
def _between_by_level_jvp(primals: Any, tangents: Any) -> Any:
    (g,), (dg,) = primals, tangents
    made = _between_by_level(g)
    return made, made * _sums_between(jnp.where(jnp.isneginf(g), jnp.zeros_like(g), dg))


def widths(start: int, stop: int) -> list[int]:
    """Return start, 2 start, 4 start, ... below stop."""
    found = []
    while start < stop:
        found.append(start)
        start *= 2
    return found


def order(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps as a column and as a row, for comparison.

    They are constants, because XLA for GPU computes every comparison of two `jnp.arange` in a
    separate kernel.
    """
    steps = np.arange(size)
    return steps[:, None], steps[None, :]
