"""Any associative operator, scanned over time with the state and reset of the other ops."""

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
    """Return the specs of (outputs, final state), split as the elements and the given state are."""

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
    """Inclusive scan with an associative operator.

        s_t = combine(s_{t-1}, e_t)          s_0 = initial_state; without one, s_1 = e_1

    Where `reset` is true, s_t = e_t. The way out for recurrences that are none of the named ones:
    running softmax (Aaren, arXiv 2405.13956), block-diagonal transitions, tropical semirings.

    Args:
      combine: `combine(earlier, later)` of two single elements, pytrees of arrays without batch
        and time axes; associative, which is not checked. It must be finite on (e, e) for each
        element e: where a state is cleared, e takes its place before it is discarded.
      elems: pytree of [B, T, ...] arrays.
      initial_state: pytree of [B, ...] arrays, of the same structure, or None.
      reset: [B, T] bool.
      algorithm: "sequential", "associative", "chunked" (log depth inside chunks, chunks one after
        the other, recomputed in the backward pass) or None, which is chunked.
      implementation: "xla" or None.
      chunk_size: steps in a chunk; 128 if None.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (s, final state): the first like `elems`; the second like `initial_state`. float16 and
      bfloat16 leaves are combined, and returned in the final state, as float32.

    Raises:
      ValueError: if structures, shapes or dtypes do not fit.
      NotImplementedError: for an implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> best, last = seqjax.monoid_scan(jnp.maximum, jnp.array([[1, 3, 2]]))
      >>> best.tolist(), last.tolist()
      ([[1, 3, 3]], [3])
    """
    op = "monoid_scan"
    elems = jax.tree.map(jnp.asarray, elems)
    batch, length = _check_elems(op, elems)
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
    # There is no kernel: an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=length)
    if initial_state is not None:
        initial_state = _check_state(op, initial_state, elems)
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
        # Any value will do for the state before the first step: a reset there discards it.
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
        _, part = local(state, cuts.at[:, 0].set(True))  # of this part by itself
        before = sequence_parallel.combine_before((part, cuts.any(axis=1)), merge, sequence_axis)
        first = sequence_parallel.is_first(sequence_axis)

        def unless_first(value: PyTree, other: PyTree) -> PyTree:
            return jax.tree.map(lambda v, o: jnp.where(first, o, v), value, other)

        # The first device has nothing to merge: it merges an element with itself and drops it.
        some = jax.tree.map(lambda e: e[:, 0], elems)
        none = jnp.zeros_like(cuts[:, 0])
        pair = unless_first(((state, none), before), ((some, none), (some, none)))
        entered = unless_first(merge(*pair)[0], state)
        ys, final = local(entered, cuts)
        final = sequence_parallel.from_last(final, sequence_axis)
    return jax.tree.map(lambda y, dtype: y.astype(dtype), ys, dtypes), final


def _with_cuts(combine: Combine) -> Combine:
    """`combine` on (element, cut) pairs: what is earlier than a cut is dropped by selection."""

    def merge(early: tuple[PyTree, Array], late: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        (early, early_cut), (late, late_cut) = early, late
        # `combine` never sees what is dropped, else its NaNs would come back as gradients.
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
    """States are float32 at least."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def _check_elems(op: str, elems: PyTree) -> tuple[int, int]:
    leaves = jax.tree.leaves(elems)
    if not leaves:
        raise ValueError(f"{op}: `elems` must hold at least one [B, T, ...] array, got {elems!r}.")
    shapes = [list(leaf.shape) for leaf in leaves]
    if any(len(s) < 2 or s[:2] != shapes[0][:2] or 0 in s for s in shapes):
        raise ValueError(
            f"{op}: every leaf of `elems` must have shape [B, T, ...] with the same B and T >= 1, "
            f"got {', '.join(map(str, shapes))}."
        )
    return leaves[0].shape[0], leaves[0].shape[1]


def _check_state(op: str, state: PyTree, elems: PyTree) -> PyTree:
    state = jax.tree.map(jnp.asarray, state)
    wanted_tree: PyTree = jax.tree.structure(elems)
    if wanted_tree != jax.tree.structure(state):
        raise ValueError(
            f"{op}: `initial_state` must have the structure of `elems`,"
            f" {checks.describe_tree(elems)}, got {checks.describe_tree(state)}."
        )
    wanted = [[e.shape[0], *e.shape[2:]] for e in jax.tree.leaves(elems)]
    got = [list(s.shape) for s in jax.tree.leaves(state)]
    if wanted != got:
        raise ValueError(f"{op}: `initial_state` must have shapes {wanted}, got {got}.")
    return jax.tree.map(lambda s, e: s.astype(_state_dtype(e.dtype)), state, elems)
