"""Scan of any step over time, in order, in recomputed chunks.

This op is for recurrences without a parallel form. It has the states, resets and memory of the
other ops, and its time grows with T on every platform.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.core.checkpointed_scan import chunk_scan, time_scan
from seqjax.types import Array, PyTree, Reset

Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
Local = Callable[[PyTree], tuple[PyTree, PyTree]]


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of (outputs, final state): split along batch and time as `xs` is."""
    batch, time, *_ = explicit_mesh.spec_of(jax.tree.leaves(arguments["xs"])[0])
    ys, state = out
    outputs = jax.tree.map(lambda y: explicit_mesh.joined(batch, time, *(None,) * (y.ndim - 2)), ys)
    return outputs, explicit_mesh.like_state(arguments.get("initial_state"), state, batch)


@explicit_mesh.auto_inside(_specs)
def step_scan(
    step: Step,
    params: PyTree,
    xs: PyTree,
    initial_state: PyTree | None = None,
    *,
    fresh_state: PyTree | None = None,
    reset: Reset | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[PyTree, PyTree]:
    """Compute any recurrence over time, step by step.

        s_t, y_t = step(params, s_{t-1}, x_t)          s_0 = initial_state

    Where `reset` is true, s_{t-1} is replaced by `fresh_state` first. Use it for recurrences that
    no parallel algorithm covers, such as self-referential weight matrices (arXiv 2202.05780). For a
    state [D] or [D, k], `nonlinear_scan` also offers Newton's method.

    The backward pass stores `xs`, the outputs and one state per chunk, and recomputes the states of
    one chunk at a time.

    Args:
      step: step(params, state, x) -> (state, y), one step of one sequence: trees of arrays without
        batch and time axes. The new state has the structure and the shapes of the old one. `step`
        must not close over arrays made inside `jit` or `grad`: pass these in `params`.
      params: pytree of arrays, shared by all sequences and steps.
      xs: pytree of [B, T, ...] arrays.
      initial_state: pytree of [B, ...] arrays; by default `fresh_state`. One of both is required.
      fresh_state: the state after a reset, a pytree of the same structure and shapes; by default
        zeros.
      reset: [B, T] bool.
      algorithm: "sequential" or None.
      implementation: "xla" or None.
      chunk_size: steps in a chunk; by default 64. Smaller chunks store more states, and recompute
        fewer at a time.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split. The devices work
        in turn, so that more devices save memory and not time.

    Returns:
      (y, final state): y has the dtypes that `step` returns. Floating-point states are carried in
      float32, or float64 if any argument is.

    Raises:
      ValueError: if structures, shapes or dtypes do not fit.
      NotImplementedError: if the algorithm or implementation does not support the call.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> def step(rate, state, x):
      ...     state = state + rate * (x - state) ** 3
      ...     return state, state
      >>> y, last = seqjax.step_scan(step, 0.5, jnp.full((1, 3), 2.0), jnp.zeros(1))
      >>> y.tolist(), last.tolist()
      ([[4.0, 0.0, 4.0]], [4.0])
    """
    op = "step_scan"
    _check_step(op, step)
    params, xs = jax.tree.map(jnp.asarray, (params, xs))
    batch, length = checks.check_time_axes(op, "xs", xs)
    reset = checks.check_reset(op, reset, batch, length)
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.select_algorithm(op, algorithm, algorithms=("sequential",), length=length)
    # The op has no kernel, so an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=length)
    state, fresh = _check_states(op, initial_state, fresh_state, batch)
    wide = _wide(params, xs, state)
    state, fresh = (jax.tree.map(lambda s: _carried(s, wide), tree) for tree in (state, fresh))
    _check_new_state(op, step, params, state, xs)
    return _scan(
        params,
        xs,
        state,
        fresh,
        reset,
        step=step,
        chunk_size=chunk_size or 64,
        sequence_axis=sequence_axis,
    )


@functools.partial(jax.jit, static_argnames=("step", "chunk_size", "sequence_axis"))
def _scan(
    params: PyTree,
    xs: PyTree,
    state: PyTree,
    fresh: PyTree,
    reset: Array | None,
    *,
    step: Step,
    chunk_size: int,
    sequence_axis: str | None,
) -> tuple[PyTree, PyTree]:
    leaves, tree = jax.tree.flatten((params, xs, state, fresh, reset))
    params, xs, state, fresh, reset = jax.tree.unflatten(tree, jax_compat.match_varying(*leaves))
    shared, shared_tree = jax.tree.flatten((params, fresh))

    def step_all(state: PyTree, inputs: Any, *shared: Array) -> tuple[PyTree, PyTree]:
        """Take one step of all sequences."""
        (x, cut), (params, fresh) = inputs, jax.tree.unflatten(shared_tree, shared)
        if cut is not None:
            state = jax.tree.map(functools.partial(_where, cut), fresh, state)
        new, y = jax.vmap(step, in_axes=(None, 0, 0))(params, state, x)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), new, state), y

    inputs = xs, reset
    row = jax.tree.map(lambda z: z[:, 0], inputs)
    arrays = (state, shared, jax.eval_shape(step_all, state, row, *shared))

    def local(state: PyTree) -> tuple[PyTree, PyTree]:
        if all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(arrays)):
            return time_scan(step_all, state, inputs, chunk_size, tuple(shared))

        # The adjoint of `time_scan` has no place for arrays without gradients.
        def advance(state: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
            return lax.scan(lambda state, row: step_all(state, row, *shared), state, block)

        return chunk_scan(advance, state, inputs, chunk_size)

    if sequence_axis is None:
        return local(state)
    return sequence_parallel.in_turn(local, state, sequence_axis)


def _where(cut: Array, new: Array, old: Array) -> Array:
    return jnp.where(cut.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _wide(*trees: PyTree) -> int:
    """Return the bits of the states' floating-point numbers: 64 if any argument has them."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(trees)]
    return max([jnp.finfo(d).bits for d in dtypes if jnp.issubdtype(d, jnp.inexact)] + [32])


def _carried(state: Array, bits: int) -> Array:
    """Cast a state to the precision in which it is carried; keep integers and booleans."""
    if not jnp.issubdtype(state.dtype, jnp.inexact):
        return state
    kind = f"complex{2 * bits}" if jnp.iscomplexobj(state) else f"float{bits}"
    return state.astype(kind)


def _check_step(op: str, step: Any) -> None:
    text = f"{op}: `step` must be a function of (params, state, x), got"
    if not callable(step):
        raise ValueError(f"{text} {type(step).__name__}; pass it first.")
    try:
        inspect.signature(step).bind(None, None, None)
    except TypeError:
        raise ValueError(f"{text} one of {inspect.signature(step)}.") from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        hash(step)
    except TypeError:
        raise ValueError(
            f"{op}: `step` must be hashable, such as a function, got {type(step).__name__}."
        ) from None


def _check_states(
    op: str, state: PyTree | None, fresh: PyTree | None, batch: int
) -> tuple[PyTree, PyTree]:
    """Return the initial state and the state after a reset, of equal structure, shapes, dtypes."""
    state = fresh if state is None else state
    if state is None:
        raise ValueError(
            f"{op}: `initial_state` must be a pytree of [B, ...] arrays, got None; pass it, or"
            " `fresh_state`."
        )
    state = jax.tree.map(jnp.asarray, state)
    shapes = [list(s.shape) for s in jax.tree.leaves(state)]
    if any(s[:1] != [batch] for s in shapes):
        raise ValueError(
            f"{op}: every leaf of `initial_state` must have shape [B={batch}, ...], got"
            f" {', '.join(map(str, shapes))}."
        )
    if fresh is None:
        return state, jax.tree.map(jnp.zeros_like, state)
    fresh = jax.tree.map(jnp.asarray, fresh)
    state_tree: PyTree = jax.tree.structure(state)
    found = [list(s.shape) for s in jax.tree.leaves(fresh)]
    if state_tree != jax.tree.structure(fresh) or found != shapes:
        raise ValueError(
            f"{op}: `fresh_state` must have the structure of `initial_state` and shapes {shapes},"
            f" got {checks.describe_tree(fresh)} with shapes {found}."
        )
    return state, jax.tree.map(lambda f, s: f.astype(s.dtype), fresh, state)


def _check_new_state(op: str, step: Step, params: PyTree, state: PyTree, xs: PyTree) -> None:
    """Raise unless `step` returns (state, y) with the structure and shapes of the state."""

    def one(leaf: Array, lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[lead:], leaf.dtype)

    old = jax.tree.map(lambda s: one(s, 1), state)
    out = jax.eval_shape(step, params, old, jax.tree.map(lambda x: one(x, 2), xs))
    text = f"{op}: `step` must return (state, y)"
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"{text}, got {checks.describe_tree(out)}.")
    new_leaves, old_leaves = jax.tree.leaves(out[0]), jax.tree.leaves(old)
    new_tree: PyTree = jax.tree.structure(out[0])
    if new_tree != jax.tree.structure(old):
        raise ValueError(
            f"{text} with the state's structure, {checks.describe_tree(old)}, got"
            f" {checks.describe_tree(out[0])}."
        )
    for new, before in zip(new_leaves, old_leaves, strict=True):
        kinds = {jnp.issubdtype(a.dtype, jnp.floating) for a in (new, before)}
        fits = kinds == {True} or jnp.promote_types(new.dtype, before.dtype) == before.dtype
        if new.shape != before.shape or not fits:
            raise ValueError(
                f"{text} with the state's shapes and dtypes, {before.dtype.name}"
                f"{list(before.shape)}, got {new.dtype.name}{list(new.shape)}."
            )
