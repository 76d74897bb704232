"""Chunks as affine maps in factors, and the loop over their states on accelerators.

A chunk of C steps that starts from the state S computes

    U  = values + erase S                      [C, V]
    O  = scores U + reads S + outputs          [C, V]
    S' = decay S + write^T U + offset          [K, V]

The factors do not depend on S. The loop over the chunks computes U and S', with two matmuls per
chunk, and the outputs of all chunks follow after it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from seqjax.ops.core.custom_adjoint import custom_adjoint
from seqjax.ops.core.linalg import product, sum_to

UNROLL = 16  # turns of a loop on accelerators between two tests of its counter
STATES = "seqjax_chunk_states"
WRITE = "ck,cv->kv"


class FactoredMap(NamedTuple):
    """A chunk of C steps as an affine map of the state S before it, in factors; see the module.

    Attributes:
      scores: [..., C, C].
      reads: [..., C, K].
      decay: [..., K, 1] or [..., 1, 1].
      write: [..., C, K].
      values: [..., C, V], or None for zero, with `erase`.
      erase: [..., C, K], or None for zero, with `values`.
      outputs: [..., C, V], or None for zero.
      offset: [..., K, V], or None for zero.
    """

    scores: jax.Array
    reads: jax.Array
    decay: jax.Array
    write: jax.Array
    values: jax.Array | None = None
    erase: jax.Array | None = None
    outputs: jax.Array | None = None
    offset: jax.Array | None = None


def total(*terms: jax.Array | None) -> jax.Array:
    """Return the sum of the terms that are not None."""
    return functools.reduce(jnp.add, [term for term in terms if term is not None])


def run_chunks(
    maps: FactoredMap,
    state: jax.Array,
    rows: jax.Array,
    reset: bool,
    poison: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of the chunks [count, B, H, C, V], and the state after the last.

    If the inputs are bfloat16, so are the states that are read, and what a chunk adds to the state
    without `erase`. U is not rounded, because its sums cancel if keys repeat. Gradients of the
    factors are products of all chunks after the backward loop.

    Args:
      maps: maps of the chunks, [count, B, H, ...].
      state: [B, H, K, V].
      rows: [count or 1, B or 1, 1, C or 1, 1], the steps that may read the states.
      reset: whether there may be resets.
      poison: [count, B, H, 1, 1], NaN where the state after the chunk is NaN, and zero elsewhere.
      dtype: dtype of the inputs.
    """
    stored = dtype if jnp.dtype(dtype) == jnp.bfloat16 else state.dtype
    count, alive = maps.write.shape[0], None
    if reset:  # False where the chunk has a reset
        alive = jnp.broadcast_to(rows[..., -1:, :], (count, *rows.shape[1:-2], 1, 1))
    if maps.erase is None:
        assert maps.values is not None
        own = product(maps.scores, maps.values)
        added = product(maps.write, maps.values, WRITE, narrow=maps.offset is None)
        added = total(added, maps.offset).astype(stored)
        states, final = _diagonal_loop(stored, count)((maps.decay, added), state, (alive, poison))
    else:
        factors = (maps.scores, maps.decay, maps.write, maps.values, maps.erase, maps.offset)
        own, states, final = _loop(stored, count)(factors, state, (alive, poison))
    return total(own, product(maps.reads, states, rows=rows), maps.outputs), final


def _masked(alive: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if alive is None else jnp.where(alive, x, jnp.zeros_like(x))


def _finite(x: jax.Array) -> jax.Array:
    return _masked(jnp.isfinite(x), x)


def _decay_gradient(decay: jax.Array, d_after: jax.Array, states: jax.Array) -> jax.Array:
    both = d_after.astype(decay.dtype) * states.astype(decay.dtype)
    axes = tuple(n for n in (-2, -1) if decay.shape[n] == 1)
    return jnp.sum(both, axis=axes, keepdims=True)


def _gradients(factors: Any, found: Any, d_first: jax.Array, poison: jax.Array) -> list[jax.Array]:
    """Return the cotangents of all arguments of a loop."""
    summed = jax.tree.map(lambda x, d: sum_to(d, x.shape).astype(x.dtype), factors, found)
    return [*jax.tree.leaves(summed), d_first, jnp.zeros_like(poison)]


def _diagonal_loop(stored: Any, count: int) -> Any:
    """Return the loop for chunks without `erase`: S' = decay S + added."""
    unroll = min(count, UNROLL)

    def forward(factors: Any, state: jax.Array, rest: Any) -> tuple[jax.Array, jax.Array]:
        def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
            (decay, added), (alive, poison) = chunk
            after = decay * _masked(alive, state) + poison
            return after + added.astype(after.dtype), state.astype(stored)

        final, states = lax.scan(step, state, (factors, rest), unroll=unroll)
        return checkpoint_name(states, STATES), final

    def adjoint(args: Any, outputs: Any, _: Any, cts: Any) -> list[jax.Array]:
        (factors, _, (alive, poison)), (states, _), (d_states, d_final) = args, outputs, cts
        decay, _ = factors

        def step(d_after: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
            decay, d_state, alive = chunk
            back = _masked(alive, decay * d_after)
            return back + d_state.astype(back.dtype), d_after.astype(stored)

        chunks = (decay, d_states, alive)
        d_first, d_after = lax.scan(step, d_final, chunks, reverse=True, unroll=unroll)
        states = _masked(alive, _finite(states))
        found = (_decay_gradient(decay, d_after, states), d_after)
        return _gradients(factors, found, d_first, poison)

    # States are named inside: the adjoint reads them, and must not run the loop again.
    return custom_adjoint(forward, adjoint, with_residuals=lambda *args: (forward(*args), ()))


def _loop(stored: Any, count: int) -> Any:
    """Return the loop for chunks with `erase`, and the products scores U after it.

    After each barrier, XLA for GPU computes a matmul and the sum with the last term in one kernel.
    """
    unroll = min(count, UNROLL)

    def written(
        values: jax.Array | None, erase: jax.Array, read: jax.Array, alive: jax.Array | None
    ) -> jax.Array:
        erased = product(erase, read)
        if alive is not None:  # `erase` is zero after a reset, but zero times NaN is NaN
            erased = jnp.where(alive, erased, _finite(erased))
        return erased if values is None else erased + values.astype(erased.dtype)

    def forward(factors: Any, state: jax.Array, rest: Any) -> Any:
        scores, *factors = factors

        def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
            (decay, write, values, erase, offset), (alive, poison) = chunk
            values = None if values is None else values.astype(state.dtype)
            fixed = (state.astype(stored), state, values, write)
            read, state, values, write = lax.optimization_barrier(fixed)
            kept = total(decay * _masked(alive, state), poison, offset)
            U = written(values, erase, read, alive)
            return product(write, U, WRITE) + kept, (read, U)

        final, (states, U) = lax.scan(step, state, (factors, rest), unroll=unroll)
        return product(scores, U), checkpoint_name(states, STATES), final

    def adjoint(args: Any, outputs: Any, _: Any, cts: Any) -> list[jax.Array]:
        (factors, _, (alive, poison)), (_, states, _) = args, outputs
        scores, decay, write, values, erase, offset = factors
        d_own, d_states, d_final = cts
        U = _finite(written(values, erase, states, alive))
        states = _finite(states)

        def step(d_after: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
            decay, write, erase, d_state, d_written, alive = chunk
            fixed = (d_after.astype(stored), d_after, d_written)
            read, d_after, d_written = lax.optimization_barrier(fixed)
            kept = _masked(alive, decay * d_after) + d_state.astype(d_after.dtype)
            d_written = (product(write, read) + d_written).astype(stored)
            return product(erase, d_written, WRITE) + kept, (read, d_written)

        d_written = product(scores, d_own, "tc,tv->cv")
        chunks = (decay, write, erase, d_states, d_written, alive)
        d_first, (d_after, d_written) = lax.scan(step, d_final, chunks, reverse=True, unroll=unroll)
        found = (
            product(d_own, U, "tv,cv->tc"),
            _decay_gradient(decay, d_after, _masked(alive, states)),
            product(U, d_after, "cv,kv->ck"),
            None if values is None else d_written,
            product(d_written, states, "cv,kv->ck"),
            None if offset is None else d_after,
        )
        return _gradients(factors, found, d_first, poison)

    return custom_adjoint(forward, adjoint, with_residuals=lambda *args: (forward(*args), ()))
