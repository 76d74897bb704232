"""Wrapper of the kernel that steps through a nonlinear recurrence with an elementwise cell."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, kernel_op
from seqjax.ops.nonlinear import jacobian_structure
from seqjax.types import Array, PyTree


def unsupported(structure: str, sequence_axis: str | None, *arrays: PyTree) -> str | None:
    """Return the reason why the kernel does not support a call, or None."""
    if structure == "dense":
        return (
            "must have a cell whose Jacobian is diagonal or block-diagonal over channels, got a"
            " dense one"
        )
    if sequence_axis is not None:
        return "does not support T split over devices"
    dtypes = [x.dtype for x in jacobian_structure.float_leaves(arrays)]
    return backends.unsupported_dtype(dtypes, "float16", "float64")


def by_kernel(
    backend: backends.Backend,
    cell: Callable[..., Array],
    out_dtype: Any,
    by_steps: Callable[..., Any],
) -> Callable[..., tuple[Array, Array]]:
    """Return the function (params, xs, h0, reset or None) -> (states, final state) on the kernels.

    The backward kernel recomputes the cell's derivative at every state. Forward mode and higher
    derivatives come from `by_steps`, the step-by-step form of `nonlinear_scan`.
    """

    def xla(params: PyTree, xs: PyTree, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        batch, length = jax.tree.leaves(xs)[0].shape[:2]
        never = jnp.zeros((batch, length), bool) if reset is None else reset
        guess = jnp.zeros((batch, length, *h0.shape[1:]), h0.dtype)  # unused
        return by_steps(params, xs, h0, never, guess, None)[:2]

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
        residuals = jax.ShapeDtypeStruct((*lead, *h0.shape[2:], h0.shape[1]), h0.dtype)
        return (states, jax.ShapeDtypeStruct(h0.shape, h0.dtype)), residuals

    return kernel_op.kernel_op(backend, xla, forward, backward, shapes)
