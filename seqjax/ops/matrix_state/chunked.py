"""Matrix-state recurrences in chunks: matmuls inside a chunk, an affine map of the state per chunk.

In every such recurrence, a chunk of C steps that starts from the state S computes

    O  = O_c + R_c S        outputs [C, V]
    S' = X_c + M_c S        state after the chunk [K, V]

and O_c, R_c, X_c, M_c do not depend on S. So the maps of several chunks are computed at once, and
only the second line runs from chunk to chunk, in order or in log depth.

Zero times NaN is NaN, so a mask alone does not keep a NaN out of a matmul. Steps with non-finite
input are therefore set to zero before the matmuls, and non-finite numbers of a state before those
of the derivatives. Every output and state that depends on them, and no other, is NaN.

Derivatives are those of JAX, except for the loop over the states of `factored_chunks`. Chunks are
recomputed in the backward pass, which stores the inputs and one state per chunk.

A block of chunks is computed at once: first their maps, then a loop over the states, then the
outputs. On a CPU the blocks are small, for the caches. On accelerators they have a thousand
matmuls, so that few kernels do the work, and bfloat16 inputs stay so for the matrix units.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.linalg import diagonal, matmul, product
from seqjax.ops.core.residual_names import RESIDUALS, named
from seqjax.ops.matrix_state.block_decays import same_segment
from seqjax.ops.matrix_state.chunk_sizes import Division
from seqjax.ops.matrix_state.factored_chunks import STATES, FactoredMap, run_chunks

Arrays = Mapping[str, jax.Array]


class ChunkMap(NamedTuple):
    """A chunk of C steps as an affine map of the state S before it.

    Attributes:
      outputs: O_c [..., C, V], the outputs for S = 0.
      reads: R_c [..., C, K]; the outputs are O_c + R_c S.
      offset: X_c [..., K, V], the state after the chunk for S = 0.
      transition: M_c [..., K, K], or its diagonal [..., K, 1] or [..., 1, 1]; the state after the
        chunk is X_c + M_c S. Decays of columns are [..., 1, V] and multiply the columns of S.
      gain: G_c [..., C, V], or None for one; the outputs are O_c + G_c * (R_c S).
    """

    outputs: jax.Array
    reads: jax.Array
    offset: jax.Array
    transition: jax.Array
    gain: jax.Array | None = None


Chunk = Callable[[Arrays], ChunkMap | FactoredMap]


def multiply_out(maps: FactoredMap) -> ChunkMap:
    """Return the map of a chunk without factors."""
    scores, reads, transition, write, values, erase, outputs, offset = maps
    write = write.mT
    if values is not None:
        own, added = product(scores, values), product(write, values)
        outputs = own if outputs is None else own + outputs
        offset = added if offset is None else added + offset
    if erase is not None:
        reads = (reads + product(scores, erase)).astype(reads.dtype)
        rows = jnp.broadcast_to(transition[..., 0], write[..., 0].shape)
        transition = diagonal(rows) + product(write, erase)
    assert outputs is not None
    assert offset is not None
    return ChunkMap(outputs, reads, offset, transition)


def apply_alive(alive: jax.Array, transition: jax.Array, state: jax.Array) -> jax.Array:
    """Return M S in the rows that no reset clears, and zero in the others, even if S is not finite.

    Non-finite numbers of S never enter a product: in the transpose of a product they would turn
    zero cotangents into NaN, which later products spread to steps after a reset. The result is
    NaN in all elements that read such a number.
    """
    zero, nan = (jnp.asarray(value, state.dtype) for value in (0, jnp.nan))
    finite = jnp.isfinite(state)
    if 1 in transition.shape[-2:]:  # a diagonal: `alive` holds for all rows or for none
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
    division: Division,
    out_dtype: Any,
    vectors: Collection[str] = (),
    scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run a recurrence chunk by chunk.

    Args:
      chunk: computes the `ChunkMap` of chunks, from arrays [..., C, features] by name.
      arrays: [B, T, H, features] by name. Two names have a special role: "log_decay", which may be
        -inf, as all names that end so, and "q", which does not write. A step in which all other
        arrays are zero must change the state by its decay only. In place of H there may be several
        axes, as in the state. An axis of 1 is shared by all heads of the others.
      state: [B, H, K, V].
      reset: [B, T] or None.
      division: the division of T into blocks of chunks.
      out_dtype: dtype of the outputs.
      vectors: names of the arrays that stay in their dtype if `division.mixed`. The other arrays
        get the dtype of the state.
      scale: a factor of the outputs, by default one.

    Returns:
      (outputs [B, T, H, V], final state).
    """
    batch, length = arrays["q"].shape[:2]
    heads, dtype = arrays["q"].ndim - 3, state.dtype  # the number of axes of heads
    size, blocks, at_once, log_depth, factored, mixed = division
    narrow = set(vectors) if mixed else set()

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, H, F] -> [blocks, at_once, B, H, C, F]
        padding = [(0, 0), (0, blocks * at_once * size - length), *[(0, 0)] * (heads + 1)]
        x = jnp.pad(x, padding)
        x = x.reshape(x.shape[0], blocks, at_once, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, -2), 0, 2)

    # [blocks, at_once, B, 1, C]
    resets = None if reset is None else chunks(jnp.expand_dims(reset, range(2, heads + 3)))[..., 0]

    def advance(state: jax.Array, block: Any, scale: jax.Array | None) -> Any:
        arrays, reset = block
        values = {name: x if name in narrow else x.astype(dtype) for name, x in arrays.items()}
        values, spoiled, bad_query = _zero_non_finite(values, reset)
        if reset is None:
            values.setdefault("log_decay", jnp.zeros((*bad_query.shape, 1), bool))
            alive = jnp.ones((1,) * values["q"].ndim, bool)
        else:
            clear, g = reset[..., None], values.get("log_decay")
            values["log_decay"] = (
                clear if g is None else jnp.where(clear, jnp.full_like(g, -jnp.inf), g)
            )
            alive = jnp.cumsum(reset, axis=-1, dtype=int)[..., None] == 0
        maps, input_dtype = chunk(values), values["q"].dtype
        nan, zero = (jnp.asarray(value, dtype) for value in (jnp.nan, 0))
        poison = jnp.where(spoiled[..., -1:, None], nan, zero)
        if factored and isinstance(maps, FactoredMap):
            resets = reset is not None
            out, final = run_chunks(maps, state, alive, resets, poison, input_dtype)
        else:
            if isinstance(maps, FactoredMap):
                maps = multiply_out(maps)
            compute = _states_in_log_depth if log_depth else _states
            offset = maps.offset + poison
            states, final = compute(maps.transition, offset, alive[..., -1:, :], state)
            reads = product(maps.reads, states, rows=alive)
            out = maps.outputs + (reads if maps.gain is None else maps.gain * reads)
        out = out if scale is None else scale * out
        return final, jnp.where((spoiled | bad_query)[..., None], nan, out).astype(out_dtype)

    # The states are saved; all else that does not depend on them is computed again. JAX cannot save
    # complex residuals in a checkpoint with a policy: it applies `lax.reduce_precision` to them.
    saved = jax.checkpoint_policies.save_only_these_names(STATES)
    policy = None if jnp.iscomplexobj(state) else saved
    advance = jax.checkpoint(advance, prevent_cse=False, policy=policy)
    blocked = {name: chunks(x) for name, x in arrays.items()}
    final, out = lax.scan(
        lambda S, block: advance(named(S, RESIDUALS), block, scale), state, (blocked, resets)
    )
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 0), -2, 3)  # [B, blocks, at_once, C, H, V]
    return out.reshape(batch, -1, *out.shape[4:])[:, :length], final


def _zero_non_finite(
    values: dict[str, jax.Array], reset: jax.Array | None
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Zero the steps with non-finite inputs, and mark the steps that depend on them.

    Returns:
      The arrays, the steps at or after a non-finite write with no reset in between, and the steps
      with a non-finite query.
    """
    finite = {name: jnp.all(jnp.isfinite(x), axis=-1) for name, x in values.items()}
    for name in filter(is_log_decay, values):  # -inf clears the state
        g = values[name]
        finite[name] = jnp.all(jnp.isfinite(g) | jnp.isneginf(jnp.real(g)), axis=-1)
    query = finite.pop("q")
    write = functools.reduce(jnp.logical_and, finite.values())
    # Shared arrays stay shared: a head's own non-finite numbers do not zero them.
    shared = [x for x in finite.values() if x.shape != write.shape]
    by_shape = {write.shape: write}
    for shape in {x.shape for x in shared}:
        by_shape[shape] = functools.reduce(jnp.logical_and, (x for x in shared if x.shape == shape))
    zeroed = {
        name: jnp.where(
            (query if name == "q" else by_shape[x.shape[:-1]])[..., None], x, jnp.zeros_like(x)
        )
        for name, x in values.items()
    }
    return zeroed, _occurred(~write, reset), ~query


def is_log_decay(name: str) -> bool:
    """Return whether an input holds logarithms of decays."""
    return name.endswith("log_decay")


def _occurred(events: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Return for each step whether an event occurred at or before it, since the last reset."""
    if reset is None:
        return jnp.cumsum(events, axis=-1, dtype=int) > 0
    return jnp.any(events[..., None, :] & same_segment(reset), axis=-1)


def _states(
    transition: jax.Array, offset: jax.Array, alive: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the states before the chunks [count, B, H, K, V], and the state after the last."""

    def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        transition, offset, alive = chunk
        return apply_alive(alive, transition, state) + offset, state

    alive = jnp.broadcast_to(alive, (transition.shape[0], *alive.shape[1:]))
    final, states = lax.scan(step, state, (transition, offset, alive))
    return states, final


def _states_in_log_depth(
    transition: jax.Array, offset: jax.Array, alive: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the results of `_states`, from the maps of all chunks combined in log depth."""

    def combine(early: Any, late: Any) -> Any:
        transition, offset, alive = late
        return (
            apply_alive(alive, transition, early[0]),
            apply_alive(alive, transition, early[1]) + offset,
            early[2] & alive,
        )

    alive = jnp.broadcast_to(alive, (transition.shape[0], *alive.shape[1:]))
    prefix = lax.associative_scan(combine, (transition, offset, alive), axis=0)
    leaving = apply_alive(prefix[2], prefix[0], state) + prefix[1]
    return jnp.concatenate([state[None], leaving[:-1]]), leaving[-1]
