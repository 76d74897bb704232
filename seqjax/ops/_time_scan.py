"""Scans over the time axis of [B, T, ...] arrays in recomputed chunks: bounded memory.

`lax.scan` differentiated by JAX stores what every step computed. Here time is cut into chunks and
each chunk is recomputed in the backward pass, so that what is stored is the inputs, the outputs
and one state per chunk. Forward mode, `vmap` and second derivatives are JAX's own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.types import PyTree

Advance = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def chunk_scan(
    advance: Advance, state: PyTree, xs: PyTree, chunk_size: int
) -> tuple[PyTree, PyTree]:
    """Carry a state over chunks of time.

    Args:
      advance: maps (state, block) to (state, outputs); the leaves of block and outputs are
        [chunk, B, ...], time first. The last chunk may be shorter.
      state: pytree.
      xs: pytree of [B, T, ...] arrays.
      chunk_size: steps in a chunk.

    Returns:
      (outputs, pytree of [B, T, ...]; final state).
    """
    length = jax.tree.leaves(xs)[0].shape[1]
    chunk_size = min(chunk_size, length)
    whole = length - length % chunk_size
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk_size, *x.shape[1:]), xs)
    advance = jax.checkpoint(advance, prevent_cse=False)
    state, ys = lax.scan(advance, state, blocks)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole < length:
        state, rest = advance(state, jax.tree.map(lambda x: x[whole:], xs))
        ys = jax.tree.map(lambda y, r: jnp.concatenate([y, r]), ys, rest)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys), state


def time_scan(step: Advance, state: PyTree, xs: PyTree, chunk_size: int) -> tuple[PyTree, PyTree]:
    """Scan `step(state, x_t) -> (state, y_t)`, the leaves of x_t being [B, ...]."""
    return chunk_scan(lambda state, block: lax.scan(step, state, block), state, xs, chunk_size)
