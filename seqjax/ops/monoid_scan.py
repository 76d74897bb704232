"""Scan with any associative operator over time, with the states and resets of the other ops."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.core.checkpointed_scan import Advance, chunk_scan
from seqjax.types import Array, PyTree, Reset

Combine = Callable[[PyTree, PyTree], PyTree]


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of (outputs, final state), split as `elems` and `initial_state` are."""

    def of_state(elem: Any) -> Any:
        batch, _, *rest = explicit_mesh.spec_of(elem)
        return explicit_mesh.joined(batch, *rest)

    def whole(array: Any) -> Any:
        return explicit_mesh.joined(*explicit_mesh.spec_of(array))

    elems, given = arguments["elems"], arguments.get("initial_state")
    state = jax.tree.map(of_state, elems) if given is None else jax.tree.map(whole, given)
    return jax.tree.map(whole, elems), state


@explicit_mesh.auto_inside(_specs)
def monoid_scan(
    combine: Combine,
    elems: PyTree,
    initial_state: PyTree | None = None,
    *,
    reset: Reset | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[PyTree, PyTree]:
    """Compute an inclusive scan with an associative operator.

        s_t = combine(s_{t-1}, e_t)          s_0 = initial_state; without one, s_1 = e_1

    Where `reset` is true, s_t = e_t. Use it for recurrences that no other op covers, such as
    running softmax (Aaren, arXiv 2405.13956), block-diagonal transitions and tropical semirings.

    Args:
      combine: `combine(earlier, later)` of two single elements, pytrees of arrays without batch
        and time axes. It must be associative, which is not checked. It must be finite on (e, e)
        for each element e: at a reset, e replaces the state before the result is discarded.
      elems: pytree of [B, T, ...] arrays.
      initial_state: pytree of [B, ...] arrays, of the same structure, or None.
      reset: [B, T] bool.
      algorithm: "sequential", "associative", or "chunked", the default (log depth inside chunks,
        which run one after the other and are recomputed in the backward pass).
      implementation: "xla" or None.
      chunk_size: steps in a chunk; by default 128.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (s, final state): s has the dtypes of `elems`. float16 and bfloat16 leaves are combined in
      float32, and are float32 in the final state.

    Raises:
      ValueError: if structures, shapes or dtypes do not fit.
      NotImplementedError: if the implementation does not support the call or the platform.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> best, last = seqjax.monoid_scan(jnp.maximum, jnp.array([[1, 3, 2]]))
      >>> best.tolist(), last.tolist()
      ([[1, 3, 3]], [3])
    """
    op = "monoid_scan"
    elems = jax.tree.map(jnp.asarray, elems)
    batch, length = checks.check_time_axes(op, "elems", elems)
    reset = checks.check_reset(op, reset, batch, length)
    checks.check_sequence_axis(op, sequence_axis)
    if not callable(combine):
        raise ValueError(
            f"{op}: `combine` must be a function of (earlier, later), got {combine!r}."
        )
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "associative", "chunked"), length=length
    )
    # The op has no kernel, so an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=length)
    if initial_state is not None:
        state = checks.check_state_tree(op, initial_state, "elems", elems)
        initial_state = jax.tree.map(lambda s, e: s.astype(_state_dtype(e.dtype)), state, elems)
    return _scan(
        elems,
        initial_state,
        reset,
        combine=combine,
        algorithm=algorithm or ("chunked" if isinstance(length, int) else "sequential"),
        chunk_size=length if algorithm == "associative" else chunk_size or 128,
        sequence_axis=sequence_axis,
    )


@functools.partial(jax.jit, static_argnames=("combine", "algorithm", "chunk_size", "sequence_axis"))
def _scan(
    elems: PyTree,
    state: PyTree | None,
    reset: Array | None,
    *,
    combine: Combine,
    algorithm: str,
    chunk_size: int,
    sequence_axis: str | None,
) -> tuple[PyTree, PyTree]:
    dtypes = jax.tree.map(lambda e: e.dtype, elems)
    elems = jax.tree.map(lambda e: e.astype(_state_dtype(e.dtype)), elems)
    shape = jax.tree.leaves(elems)[0].shape[:2]
    cuts = jnp.zeros(shape, bool) if reset is None else reset
    if state is None:
        # The value of the state before the first step is arbitrary: a reset there discards it.
        begins = sequence_axis is None or sequence_parallel.is_first(sequence_axis)
        cuts = cuts.at[:, 0].set(cuts[:, 0] | begins)
        state = jax.tree.map(lambda e: e[:, 0], elems)
    leaves, tree = jax.tree.flatten((elems, cuts, state))
    elems, cuts, state = jax.tree.unflatten(tree, jax_compat.match_varying(*leaves))
    merge = jax.vmap(_with_cuts(combine))
    advance = _sequential(merge) if algorithm == "sequential" else _associative(merge)

    def local(state: PyTree, cuts: Array) -> tuple[PyTree, PyTree]:
        return chunk_scan(advance, state, (elems, cuts), chunk_size)

    if sequence_axis is None:
        ys, final = local(state, cuts)
    else:
        _, part = local(state, cuts.at[:, 0].set(True))  # the result of this shard alone
        before = sequence_parallel.combine_before((part, cuts.any(axis=1)), merge, sequence_axis)
        first = sequence_parallel.is_first(sequence_axis)

        def unless_first(value: PyTree, other: PyTree) -> PyTree:
            return jax.tree.map(lambda v, o: jnp.where(first, o, v), value, other)

        # The first device has nothing to merge. It merges an element with itself and discards it.
        some = jax.tree.map(lambda e: e[:, 0], elems)
        none = jnp.zeros_like(cuts[:, 0])
        pair = unless_first(((state, none), before), ((some, none), (some, none)))
        entered = unless_first(merge(*pair)[0], state)
        ys, final = local(entered, cuts)
        final = sequence_parallel.from_last(final, sequence_axis)
    return jax.tree.map(lambda y, dtype: y.astype(dtype), ys, dtypes), final


def _with_cuts(combine: Combine) -> Combine:
    """Lift `combine` to (element, cut) pairs: select away what is earlier than a cut."""

    def merge(early: tuple[PyTree, Array], late: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        (early, early_cut), (late, late_cut) = early, late
        # `combine` must not see discarded values: their NaNs would return as gradients.
        seen = jax.tree.map(lambda old, new: jnp.where(late_cut, new, old), early, late)
        merged = combine(seen, late)
        merged = jax.tree.map(lambda both, new: jnp.where(late_cut, new, both), merged, late)
        return merged, early_cut | late_cut

    return merge


def _sequential(merge: Combine) -> Advance:
    def step(state: PyTree, late: tuple[PyTree, Array]) -> tuple[PyTree, PyTree]:
        state, _ = merge((state, jnp.zeros_like(late[1])), late)
        return state, state

    return lambda state, block: lax.scan(step, state, block)


def _associative(merge: Combine) -> Advance:
    def advance(state: PyTree, block: tuple[PyTree, Array]) -> tuple[PyTree, PyTree]:
        prefix = lax.associative_scan(jax.vmap(merge), block, axis=0)
        before = (state, jnp.zeros_like(block[1][0]))
        ys, _ = jax.vmap(merge, in_axes=(None, 0))(before, prefix)
        return jax.tree.map(lambda y: y[-1], ys), ys

    return advance


def _state_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of states: at least float32."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype
