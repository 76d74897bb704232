"""Scans over the time axis of [B, T, ...] arrays in recomputed chunks: bounded memory.

`lax.scan` differentiated by JAX stores the residuals of every step. Here time is split into chunks
and each chunk is recomputed in the backward pass. The stored arrays are the inputs, the outputs
and one state per chunk. Forward mode, `vmap` and second derivatives are those of JAX.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.custom_adjoint import (
    custom_adjoint,
    inexact,
    put,
    unless_differentiated,
)
from seqjax.ops.core.residual_names import RESIDUALS, named
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
    # A symbolic T, under `jax.export`, is known to be a multiple of 1 only.
    chunk_size = min(chunk_size, length) if isinstance(length, int) else 1
    count = length // chunk_size
    whole = count * chunk_size
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)
    blocks = jax.tree.map(lambda x: x[:whole].reshape(count, chunk_size, *x.shape[1:]), xs)
    recomputed = jax.checkpoint(advance, prevent_cse=False)

    def advance_named(state: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
        return recomputed(named(state, RESIDUALS), block)

    state, ys = lax.scan(advance_named, state, blocks)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole < length:
        state, rest = advance_named(state, jax.tree.map(lambda x: x[whole:], xs))
        ys = jax.tree.map(lambda y, r: jnp.concatenate([y, r]), ys, rest)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys), state


def time_scan(
    step: Callable[..., tuple[PyTree, PyTree]],
    state: PyTree,
    xs: PyTree,
    chunk_size: int,
    shared: tuple[jax.Array, ...] = (),
) -> tuple[PyTree, PyTree]:
    """Scan `step(state, x_t, *shared) -> (state, y_t)`, the leaves of x_t being [B, ...].

    Inside a chunk, JAX's transpose of `lax.scan` would store and read every product of `step`. The
    adjoint below stores the states and differentiates `step` in the backward loop. On CPU this is
    3 to 8 times faster for the matrix states. Without derivatives there are no chunks: on CPU their
    copies and loops took a quarter of the time of `linear_attention` for K = V = 64.

    `step` must not close over arrays that are differentiated: pass them as `shared`. Neither `step`
    nor its derivative should sum over a minor axis; see `seqjax.ops.core.linalg`.
    """

    def advance(state: PyTree, block: PyTree, *shared: jax.Array) -> tuple[PyTree, PyTree]:
        return lax.scan(lambda state, x: step(state, x, *shared), state, block)

    def adjoint(args: tuple[PyTree, ...], cotangents: PyTree) -> list[jax.Array]:
        state, block, *shared = args
        leaves, tree = jax.tree.flatten(block)
        moving = inexact(leaves)

        def back(carry: PyTree, inputs: Any) -> tuple[PyTree, Any]:
            found, leaves, d_out = inputs

            def of_moving(state: PyTree, values: list[jax.Array], *shared: jax.Array) -> PyTree:
                x = jax.tree.unflatten(tree, put(leaves, moving, values))
                return step(state, x, *shared)

            _, pull = jax.vjp(of_moving, found, [leaves[i] for i in moving], *shared)
            d_state, d_values, *d_shared = pull((carry[0], d_out))
            return (d_state, jax.tree.map(jnp.add, carry[1], d_shared)), d_values

        _, found = lax.scan(lambda s, x: (step(s, x, *shared)[0], s), state, block)
        d_last, d_outs = cotangents
        start = (d_last, [jnp.zeros_like(x) for x in shared])
        (d_state, d_shared), d_block = lax.scan(back, start, (found, leaves, d_outs), reverse=True)
        return [*jax.tree.leaves(d_state), *d_block, *d_shared]

    run = custom_adjoint(advance, adjoint)

    def whole(state: PyTree, xs: PyTree, *shared: jax.Array) -> tuple[PyTree, PyTree]:
        state, ys = advance(state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs), *shared)
        return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys), state

    def in_chunks(state: PyTree, xs: PyTree, *shared: jax.Array) -> tuple[PyTree, PyTree]:
        return chunk_scan(lambda state, block: run(state, block, *shared), state, xs, chunk_size)

    return unless_differentiated(whole, in_chunks)(state, xs, *shared)
