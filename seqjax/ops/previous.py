"""The value one step earlier, across resets, calls and devices."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.types import PyTree, Reset


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of (values, final state), split as `x` is."""
    del out

    def of_state(x: Any) -> Any:
        batch, _, *rest = explicit_mesh.spec_of(x)
        return explicit_mesh.joined(batch, *rest)

    def of_values(x: Any) -> Any:
        return explicit_mesh.joined(*explicit_mesh.spec_of(x))

    x = arguments["x"]
    return jax.tree.map(of_values, x), jax.tree.map(of_state, x)


@explicit_mesh.auto_inside(_specs)
def previous(
    x: PyTree,
    initial_state: PyTree | None = None,
    reset: Reset | None = None,
    sequence_axis: str | None = None,
    *,
    fill: float = 0.0,
) -> tuple[PyTree, PyTree]:
    """Return the values one step earlier, with `fill` after resets.

        y_t = x_{t-1}        x_0 = initial_state

    Where `reset` is true, y_t = fill. Use `previous` for token shifts, two-point rules, and
    recurrences that read the state before a step.

    Args:
      x: array [B, T, ...], or a pytree of them with the same B and T.
      initial_state: the value before the first step, [B, ...], in the structure of `x`; by default
        `fill`. Pass the final state of an earlier call to continue it.
      reset: [B, T] bool, True where the earlier steps are cleared.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.
      fill: the value after a reset.

    Returns:
      (y in the shapes and dtypes of `x`, the last value of the sequence [B, ...]).

    Raises:
      ValueError: if shapes or dtypes do not fit.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> x = jnp.arange(1.0, 5.0).reshape(1, 4)
      >>> reset = jnp.array([[False, False, True, False]])
      >>> y, last = seqjax.ops.previous(x, jnp.array([9.0]), reset)
      >>> y.tolist(), last.tolist()
      ([[9.0, 1.0, 0.0, 3.0]], [4.0])
    """
    op = "previous"
    x = jax.tree.map(jnp.asarray, x)
    batch, length = checks.check_time_axes(op, "x", x)
    leaves, tree = jax.tree.flatten(x)
    reset = checks.check_reset(op, reset, batch, length)
    checks.check_sequence_axis(op, sequence_axis)
    if initial_state is None:
        first = [jnp.full_like(leaf[:, 0], fill) for leaf in leaves]
    else:
        first = jax.tree.leaves(checks.check_state_tree(op, initial_state, "x", x))
        for start, leaf in zip(first, leaves, strict=True):
            if jnp.promote_types(start.dtype, leaf.dtype) != leaf.dtype and not (
                jnp.issubdtype(leaf.dtype, jnp.floating)
                and jnp.issubdtype(start.dtype, jnp.floating)
            ):
                raise ValueError(
                    f"{op}: `initial_state` must have a dtype that {leaf.dtype} can hold, got"
                    f" {start.dtype}; cast it first."
                )
    *varying, reset = jax_compat.match_varying(*first, *leaves, reset)
    first, leaves = varying[: len(first)], varying[len(first) :]
    earlier = [
        sequence_parallel.previous(start.astype(leaf.dtype), leaf, reset, sequence_axis, fill)
        for start, leaf in zip(first, leaves, strict=True)
    ]
    last = [leaf[:, -1] for leaf in leaves]
    if sequence_axis is not None:  # a sum over devices, which is not defined for booleans
        numbers = [y.astype(jnp.int32) if y.dtype == bool else y for y in last]
        numbers = sequence_parallel.from_last(numbers, sequence_axis)
        last = [n.astype(y.dtype) for n, y in zip(numbers, last, strict=True)]
    return jax.tree.unflatten(tree, earlier), jax.tree.unflatten(tree, last)
