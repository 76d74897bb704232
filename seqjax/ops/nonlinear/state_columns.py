"""Steps on the coupled numbers of a state, each as a separate array.

A state [D, k] holds k coupled numbers of each channel, such as (c, h) of an LSTM. On CPU, XLA
vectorizes a step over D if each of its arrays is [D], and not if the numbers alternate in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jaxpr_interpreter import bind, interpret, primitive_names
from seqjax.types import PyTree

FEW = 8  # coupled numbers of a channel; more are the channels of a head
# Functions with custom derivatives stay whole.
INLINED = primitive_names("jit pjit closed_call")


class _Columns(NamedTuple):
    """An array [D, k] as k arrays [D]."""

    arrays: tuple[jax.Array, ...]


def split_state(state: jax.Array, shape: Sequence[int]) -> list[jax.Array]:
    """Return the coupled numbers of states [..., D, k] of shape [D, k], if they are few."""
    return [state[..., i] for i in range(shape[-1])] if _few(shape) else [state]


def join_state(columns: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    """Return the states [..., D] or [..., D, k] from the results of `split_state`."""
    return jnp.stack(columns, axis=-1) if _few(shape) else columns[0]


def _few(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and 1 <= shape[-1] <= FEW


def on_columns(
    step: Callable[[jax.Array, PyTree], jax.Array], shape: Sequence[int]
) -> Callable[[Sequence[jax.Array], PyTree], list[jax.Array]]:
    """Return a step of one sequence as a function of the columns of its state.

    Stacks of columns and slices of stacks become the columns. Their derivatives would be padded
    arrays [D, k], whose k numbers alternate in memory.

    Args:
      step: (state, x) -> next state of the same shape.
      shape: of the state, [D] or [D, k].
    """
    if not _few(shape):
        return lambda columns, x: [step(columns[0], x)]

    def run(columns: Sequence[jax.Array], x: PyTree) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(x)
        program = jax.make_jaxpr(lambda h, *leaves: step(h, jax.tree.unflatten(tree, leaves)))(
            join_state(columns, shape), *leaves
        )
        [out] = interpret(program, [_Columns(tuple(columns)), *leaves], _same, _apply, INLINED)
        return list(out.arrays) if isinstance(out, _Columns) else split_state(out, shape)

    return run


def _same(array: Any) -> Any:
    return array


def _apply(eqn: Any, ins: list[Any]) -> Sequence[Any]:
    """Run an operation; keep stacks of columns, slices of stacks and single columns as columns."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stack" and params["axis"] == 1 and len(eqn.invars[0].aval.shape) == 1:
        return [_Columns(tuple(ins))]
    if ins and isinstance(ins[0], _Columns):
        [columns] = ins[0]
        before, after = (v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
        # A stack has at least one column: an empty slice is an array.
        if name == "slice" and params["strides"] is None and after[0] == before[0] and after[1]:
            return [_Columns(columns[params["start_indices"][1] :][: after[1]])]
        if name == "squeeze" and params["dimensions"] == (1,):
            return [columns[0]]
    arrays = [jnp.stack(x.arrays, axis=-1) if isinstance(x, _Columns) else x for x in ins]
    return bind(eqn, params)(*arrays)
