"""Matrix-state recurrences in chunks: matmuls inside a chunk, an affine map of the state per chunk.

In every such recurrence, a chunk of C steps that starts from the state S computes

    O  = O_c + R_c S        outputs [C, V]
    S' = X_c + M_c S        state after the chunk [K, V]

and O_c, R_c, X_c, M_c do not depend on S. So the maps of several chunks are computed at once, and
only the second line runs from chunk to chunk, in order or in log depth.

Zero times NaN is NaN, so a mask alone does not keep a NaN out of a matmul. Steps with non-finite
input, and non-finite numbers of a state, are therefore set to zero before the matmuls. Every output
and state that depends on them, and no other, is NaN.

Derivatives are those of JAX. Chunks are recomputed in the backward pass, which stores the inputs
and one state per chunk.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.linalg import matmul
from seqjax.ops.matrix_state.decays import same_segment

# Number of matmuls of a kind that run at once: enough for two cores, few enough for their caches.
PRODUCTS = 16

Arrays = Mapping[str, jax.Array]


class ChunkMap(NamedTuple):
    """A chunk of C steps as an affine map of the state S before it.

    Attributes:
      outputs: O_c [..., C, V], the outputs for S = 0.
      reads: R_c [..., C, K]; the outputs are O_c + R_c S.
      offset: X_c [..., K, V], the state after the chunk for S = 0.
      transition: M_c [..., K, K], or its diagonal [..., K, 1] or [..., 1, 1]; the state after the
        chunk is X_c + M_c S.
    """

    outputs: jax.Array
    reads: jax.Array
    offset: jax.Array
    transition: jax.Array


Chunk = Callable[[Arrays], ChunkMap]


def apply_alive(alive: jax.Array, transition: jax.Array, state: jax.Array) -> jax.Array:
    """Return M S in the rows that no reset clears, and zero in the others, even if S is not finite.

    Non-finite numbers of S never enter a product: in the transpose of a product they would turn
    zero cotangents into NaN, which later products spread to steps after a reset. The result is
    NaN in all elements that read such a number.
    """
    zero, nan = (jnp.asarray(value, state.dtype) for value in (0, jnp.nan))
    finite = jnp.isfinite(state)
    if transition.shape[-1] == 1:  # a diagonal: `alive` holds for all rows or for none
        product = transition * jnp.where(alive & finite, state, zero)
    else:
        product = matmul(jnp.where(alive, transition, zero), jnp.where(finite, state, zero))
        finite = jnp.all(finite, axis=-2, keepdims=True)
    return jnp.where(alive, jnp.where(finite, product, nan), zero)


def scan_chunks(
    chunk: Chunk,
    arrays: dict[str, jax.Array],
    state: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    chunk_size: int,
    log_depth: bool,
) -> tuple[jax.Array, jax.Array]:
    """Run a recurrence chunk by chunk.

    Args:
      chunk: computes the `ChunkMap` of chunks, from arrays [..., C, features] by name.
      arrays: [B, T, H, features] by name. Two names have a special role: "log_decay", which may be
        -inf, and "q", which does not write. A step in which all other arrays are zero must change
        the state by its decay only.
      state: [B, H, K, V].
      reset: [B, T] or None.
      out_dtype: dtype of the outputs.
      chunk_size: C, rounded up to a power of two.
      log_depth: compute all chunks at once and combine them in log depth. Otherwise the number of
        chunks computed at once is bounded to `PRODUCTS` matmuls of a kind, which bounds the memory.

    Returns:
      (outputs [B, T, H, V], final state).
    """
    batch, length, heads = arrays["q"].shape[:3]
    dtype = state.dtype
    # Treat symbolic sizes, under `jax.export`, as large ones.
    known = isinstance(length, int)
    size = 1 << ((min(chunk_size, length) if known else chunk_size) - 1).bit_length()
    count = -(-length // size)
    products = batch * heads if isinstance(batch, int) else PRODUCTS
    if log_depth or (known and products * count <= 2 * PRODUCTS):
        blocks, at_once = 1, count
    else:
        at_once = max(1, PRODUCTS // products)
        blocks = -(-count // at_once)
        at_once = -(-count // blocks) if known else at_once

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, H, F] -> [blocks, at_once, B, H, C, F]
        x = jnp.pad(x, [(0, 0), (0, blocks * at_once * size - length), (0, 0), (0, 0)])
        x = x.reshape(x.shape[0], blocks, at_once, size, *x.shape[2:])
        return jnp.transpose(x, (1, 2, 0, 4, 3, 5))

    if reset is None:
        reset = jnp.zeros((batch, length), bool)
    resets = chunks(reset[:, :, None, None])[..., 0]  # [blocks, at_once, B, 1, C]

    def advance(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        arrays, reset = block
        since_reset = same_segment(reset)
        values = {name: x.astype(dtype) for name, x in arrays.items()}
        values, spoiled, bad_query = _zero_non_finite(values, since_reset)
        clear = reset[..., None]
        if "log_decay" in values:
            g = values["log_decay"]
            clear = jnp.where(clear, jnp.full_like(g, -jnp.inf), g)
        values["log_decay"] = clear
        maps = chunk(values)
        alive = ~_occurred(reset, jnp.tril(jnp.ones_like(since_reset)))[..., None]
        nan = jnp.full((), jnp.nan, dtype)
        offset = jnp.where(spoiled[..., -1:, None], nan, maps.offset)
        states, final = _carry(maps._replace(offset=offset), alive[..., -1:, :], state, log_depth)
        reads = apply_alive(alive, maps.reads, states)
        spoiled = (spoiled | bad_query)[..., None]
        return final, jnp.where(spoiled, nan, maps.outputs + reads).astype(out_dtype)

    advance = jax.checkpoint(advance, prevent_cse=False)
    blocked = {name: chunks(x) for name, x in arrays.items()}
    final, out = lax.scan(advance, state, (blocked, resets))
    out = jnp.transpose(out, (2, 0, 1, 4, 3, 5))  # [B, blocks, at_once, C, H, V]
    return out.reshape(batch, -1, *out.shape[4:])[:, :length], final


def _zero_non_finite(
    values: dict[str, jax.Array], since_reset: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Zero the steps with non-finite inputs, and mark the steps that depend on them.

    Returns:
      The arrays, the steps at or after a non-finite write with no reset in between, and the steps
      with a non-finite query.
    """
    finite = {name: jnp.all(jnp.isfinite(x), axis=-1) for name, x in values.items()}
    if "log_decay" in values:  # -inf clears the state
        g = values["log_decay"]
        finite["log_decay"] = jnp.all(jnp.isfinite(g) | jnp.isneginf(jnp.real(g)), axis=-1)
    query = finite.pop("q")
    write = functools.reduce(jnp.logical_and, finite.values())
    zeroed = {
        name: jnp.where((query if name == "q" else write)[..., None], x, jnp.zeros_like(x))
        for name, x in values.items()
    }
    return zeroed, _occurred(~write, since_reset), ~query


def _occurred(events: jax.Array, steps: jax.Array) -> jax.Array:
    """Return for each step t whether an event [..., C] occurred in its `steps` [..., t, :]."""
    return jnp.any(events[..., None, :] & steps, axis=-1)


def _carry(
    maps: ChunkMap, alive: jax.Array, state: jax.Array, log_depth: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the states before the chunks [count, B, H, K, V], and the state after the last."""
    if log_depth:

        def combine(early: Any, late: Any) -> Any:
            transition, offset, alive = late
            return (
                apply_alive(alive, transition, early[0]),
                apply_alive(alive, transition, early[1]) + offset,
                early[2] & alive,
            )

        prefix = lax.associative_scan(combine, (maps.transition, maps.offset, alive), axis=0)
        leaving = apply_alive(prefix[2], prefix[0], state) + prefix[1]
        return jnp.concatenate([state[None], leaving[:-1]]), leaving[-1]

    def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        transition, offset, alive = chunk
        return apply_alive(alive, transition, state) + offset, state

    final, states = lax.scan(step, state, (maps.transition, maps.offset, alive))
    return states, final
