"""A nonlinear recurrence by a kernel that steps through it, where its cell is elementwise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, kernel_op
from seqjax.ops.nonlinear import jacobian_structure
from seqjax.types import Array, PyTree


def lacking(structure: str, sequence_axis: str | None, *arrays: PyTree) -> str | None:
    """What the kernel cannot do of this call."""
    if structure == "dense":
        return "is for cells whose channels do not meet, and this one's Jacobian is dense"
    if sequence_axis is not None:
        return "cannot have T split over devices"
    refused = {jnp.dtype("float16"), jnp.dtype("float64")}
    found = refused.intersection(x.dtype for x in jacobian_structure.float_leaves(arrays))
    return f"takes no {found.pop()} arrays" if found else None


def by_kernel(
    use: backends.Use, cell: Callable[..., Array], out: Any, run: Callable[..., Any]
) -> Callable[..., tuple[Array, Array]]:
    """(params, xs, h0, reset or None) -> (states, final state), by the kernels of the platform.

    The backward kernel takes the cell's derivative at every state on the way; forward mode and
    higher derivatives are those of `run`, which is `nonlinear_scan`'s `_run`, step by step.
    """

    def xla(params: PyTree, xs: PyTree, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        batch, length = jax.tree.leaves(xs)[0].shape[:2]
        never = jnp.zeros((batch, length), bool) if reset is None else reset
        guess = jnp.zeros((batch, length, *h0.shape[1:]), h0.dtype)  # nobody needs one
        return run(params, xs, h0, never, guess, None)[:2]

    def forward(kernels: Any, *args: Any, save: bool) -> Any:
        *found, kept = kernels.scan(cell, *args, out_dtype=out, keep=save, interpret=use.interpret)
        return tuple(found), kept if save else ()

    def backward(kernels: Any, args: Any, outputs: Any, kept: Array, cts: Any) -> list[Array]:
        d_params, d_xs, d_h0 = kernels.adjoint(cell, *args, kept, *cts, interpret=use.interpret)
        return [*d_params, *d_xs, d_h0]

    def saved(params: PyTree, xs: PyTree, h0: Array, *_: Any) -> jax.ShapeDtypeStruct:
        lead = jax.tree.leaves(xs)[0].shape[:2]
        return jax.ShapeDtypeStruct((*lead, *h0.shape[2:], h0.shape[1]), h0.dtype)

    return kernel_op.kernel_op(use, xla, forward, backward, saved)
