"""Matrix-state recurrences in chunks: matmuls inside a chunk, an affine map of the state per chunk.

Whatever the recurrence, a chunk of C steps entered with state S amounts to

    O  = O_c + R_c S        outputs [C, V]
    S' = X_c + M_c S        the state that leaves [K, V]

and O_c, R_c, X_c, M_c do not depend on S. So chunks are prepared side by side, and only the second
line runs from chunk to chunk, in order or in log depth.

A matmul multiplies what a mask sets to zero, and zero times NaN is NaN. So steps with non-finite
input, and non-finite numbers of a state, are set to zero before the matmuls. Every output and
state that they reach, and no other, is NaN.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.linalg import matmul
from seqjax.ops.matrix_state.decays import same_segment

# Matmuls of a kind that are done side by side: enough for two cores, few enough for their caches.
PRODUCTS = 16

Arrays = Mapping[str, jax.Array]


class ChunkMap(NamedTuple):
    """A chunk as an affine map of the state."""

    outputs: jax.Array  # O_c [..., C, V]
    reads: jax.Array  # R_c [..., C, K]
    offset: jax.Array  # X_c [..., K, V]
    transition: jax.Array  # M_c [..., K, K], or [..., K, 1] or [..., 1, 1] where it is diagonal


Prepare = Callable[[Arrays], ChunkMap]


def apply_alive(alive: jax.Array, transition: jax.Array, state: jax.Array) -> jax.Array:
    """Return M S in the rows that are alive, and zero in the others, for any values in S.

    Non-finite numbers of S never enter a product: in the transpose of a product they would turn
    zero cotangents into NaN, which later products spread to steps after a reset. The result is
    NaN in all elements that read such a number.
    """
    zero, nan = (jnp.asarray(value, state.dtype) for value in (0, jnp.nan))
    finite = jnp.isfinite(state)
    if transition.shape[-1] == 1:  # a diagonal: all of the state is alive or none of it
        product = transition * jnp.where(alive & finite, state, zero)
    else:
        product = matmul(jnp.where(alive, transition, zero), jnp.where(finite, state, zero))
        finite = jnp.all(finite, axis=-2, keepdims=True)
    return jnp.where(alive, jnp.where(finite, product, nan), zero)


def scan_chunks(
    prepare: Prepare,
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
      prepare: makes the `ChunkMap` of chunks, from arrays [..., C, features].
      arrays: [B, T, H, features] by name; "g", the log decay if there is one (`_decays` says what
        becomes of it), and "q", which writes nothing, have a role here, and a step in which all
        but "g" are zero must leave the state to its decay.
      state: [B, H, K, V].
      reset: [B, T] or None.
      out_dtype: of the outputs.
      chunk_size: C; rounded up to a power of two.
      log_depth: prepare all chunks side by side and combine them in log depth. Otherwise as many
        are prepared at once as make `PRODUCTS` matmuls of a kind, and the others wait, so that
        the memory is that of a few chunks.

    Returns:
      (outputs [B, T, H, V], final state).
    """
    batch, length, heads = arrays["q"].shape[:3]
    dtype = state.dtype
    # Symbolic sizes, under `jax.export`, count as large ones.
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
    cuts = chunks(reset[:, :, None, None])[..., 0]  # [blocks, at_once, B, 1, C]

    def advance(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        arrays, cut = block
        values = {name: x.astype(dtype) for name, x in arrays.items()}
        values, spoiled, unread = _take_out_non_finite(values, cut)
        clear = cut[..., None]
        if "g" in values:
            clear = jnp.where(clear, jnp.full_like(values["g"], -jnp.inf), values["g"])
        values["g"] = clear
        maps = prepare(values)
        alive = ~_reached(cut, jnp.zeros_like(cut))[..., None]
        nan = jnp.full((), jnp.nan, dtype)
        offset = jnp.where(spoiled[..., -1:, None], nan, maps.offset)
        states, final = _carry(maps._replace(offset=offset), alive[..., -1:, :], state, log_depth)
        reads = apply_alive(alive, maps.reads, states)
        spoiled = (spoiled | unread)[..., None]
        return final, jnp.where(spoiled, nan, maps.outputs + reads).astype(out_dtype)

    # Recomputed in the backward pass, so that what is kept is the inputs and a state per block.
    advance = jax.checkpoint(advance, prevent_cse=False)
    blocked = {name: chunks(x) for name, x in arrays.items()}
    final, out = lax.scan(advance, state, (blocked, cuts))
    out = jnp.transpose(out, (2, 0, 1, 4, 3, 5))  # [B, blocks, at_once, C, H, V]
    return out.reshape(batch, -1, *out.shape[4:])[:, :length], final


def _take_out_non_finite(
    values: dict[str, jax.Array], cut: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Zero the steps with non-finite numbers, and say what they reach.

    Returns the arrays, the steps that find such a number written since the last reset, and the
    steps whose own query is such a number.
    """
    finite = {name: jnp.all(jnp.isfinite(x), axis=-1) for name, x in values.items()}
    if "g" in values:  # where -inf has a meaning
        decayed = jnp.isfinite(values["g"]) | jnp.isneginf(jnp.real(values["g"]))
        finite["g"] = jnp.all(decayed, axis=-1)
    asks = finite.pop("q")
    writes = functools.reduce(jnp.logical_and, finite.values())
    kept = {
        name: jnp.where((asks if name == "q" else writes)[..., None], x, jnp.zeros_like(x))
        for name, x in values.items()
    }
    return kept, _reached(~writes, cut), ~asks


def _reached(events: jax.Array, cut: jax.Array) -> jax.Array:
    """Whether an event [..., C] has happened at or before each step, and no cut since."""
    return jnp.any(events[..., None, :] & same_segment(cut), axis=-1)


def _carry(
    maps: ChunkMap, alive: jax.Array, state: jax.Array, log_depth: bool
) -> tuple[jax.Array, jax.Array]:
    """The states that enter the chunks [count, B, H, K, V], and the one that leaves the last."""
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
