"""Wrapper of the kernels that step through a nonlinear recurrence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, kernel_op
from seqjax.ops.nonlinear import jacobian_structure
from seqjax.types import Array, PyTree


def unsupported(sequence_axis: str | None, params: PyTree, xs: PyTree, h0: Array) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    if sequence_axis is not None:
        return "does not support T split over devices"
    leaves = jax.tree.leaves((params, xs, h0))
    symbolic = [size for leaf in leaves for size in leaf.shape if not isinstance(size, int)]
    if symbolic:
        return f"must have sizes that are known at trace time, got the symbolic size {symbolic[0]}"
    dtypes = [x.dtype for x in jacobian_structure.float_leaves((params, xs, h0))]
    return backends.unsupported_dtype(dtypes, "float16", "float64")


def refused(cell: Any, structure: str, interpret: bool) -> tuple[tuple[str, str], ...]:
    """Return the platforms whose kernel does not support a cell, each with the reason.

    Interpret mode runs cells with matrices by the TPU kernel, on every jax version. Both kernels
    check the cell and the sizes when the program is lowered.
    """
    if not interpret or (structure != "dense" and not _has_dense_heads(cell)):
        return ()
    return (("cuda", "is not interpreted for a cell with matrices"),)


def _has_dense_heads(cell: Any) -> bool:
    """Return whether a cell has heads with dense cells, like `seqjax.cells.Headwise`."""
    return hasattr(cell, "over_heads") and cell.cell.structure == "dense"


def by_kernel(
    backend: backends.Backend,
    cell: Any,
    structure: tuple[str, str],
    out_dtype: Any,
    by_steps: Callable[..., Any],
) -> Callable[..., tuple[Array, Array]]:
    """Return the function (params, xs, h0, reset or None) -> (states, final state) of the kernels.

    The backward kernel recomputes the cell's derivative at every state. Forward mode and higher
    derivatives come from `by_steps`, the step-by-step form of `nonlinear_scan`. For a cell
    with dense heads, the heads are one more axis of the kernels' grid.
    """
    if _has_dense_heads(cell):
        return cell.over_heads(
            by_kernel(backend, cell.cell, ("dense", "dense"), out_dtype, by_steps)
        )

    def xla(params: PyTree, xs: PyTree, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        batch, length = jax.tree.leaves(xs)[0].shape[:2]
        never = jnp.zeros((batch, length), bool) if reset is None else reset
        guess = jnp.zeros((batch, length, *h0.shape[1:]), h0.dtype)  # unused
        out = by_steps(params, xs, h0, never, guess, None, cell=cell, structure=structure)
        return out[0], out[1]

    def forward(kernels: Any, *args: Any, save: bool) -> Any:
        *outputs, states = kernels.scan(
            cell, *args, out_dtype=out_dtype, save_states=save, interpret=backend.interpret
        )
        return tuple(outputs), states if save else ()

    def backward(kernels: Any, args: Any, outputs: Any, states: Array, cts: Any) -> list[Array]:
        d_params, d_xs, d_h0 = kernels.adjoint(
            cell, *args, states, *cts, interpret=backend.interpret
        )
        return [*d_params, *d_xs, d_h0]

    def shapes(params: PyTree, xs: PyTree, h0: Array, *_: Any) -> Any:
        lead = jax.tree.leaves(xs)[0].shape[:2]
        states = jax.ShapeDtypeStruct((*lead, *h0.shape[1:]), out_dtype)
        numbers = tuple(k for k in h0.shape[2:] if k > 1)  # the kernels have no axis of one
        residuals = jax.ShapeDtypeStruct((*lead, *numbers, h0.shape[1]), h0.dtype)
        return (states, jax.ShapeDtypeStruct(h0.shape, h0.dtype)), residuals

    return kernel_op.kernel_op(backend, xla, forward, backward, shapes)
