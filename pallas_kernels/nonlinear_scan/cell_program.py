"""A cell and the arrays of a call, converted to the layout of the GPU kernels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.nonlinear_scan.cell_trace import (
    OP,
    ArrayLayout,
    Sizes,
    array_layout,
    by_channel,
)

Cell = Callable[[Any, jax.Array, Any], jax.Array]
Row = jax.Array
DTYPES = ("float32", "bfloat16", "int32")


class CellProgram(NamedTuple):
    """A cell as a function of rows, and the arrays of a call in the kernels' layout.

    Attributes:
      forward: (rows of parameters, state and input) -> rows of the next state.
      backward: (these rows and rows of the state's cotangent) -> rows of the cotangents of the
        floating-point arguments.
      state: layout of the state.
      params: layouts of the arrays that the cell closes over, then of its parameters.
      xs: layouts of the inputs.
      closed_over: number of `params` that the cell closes over.
      param_arrays: the arrays of `params`, [1, (R,) D].
      x_arrays: the arrays of `xs`, [B, T, (R,) D].
    """

    forward: Callable[..., Sequence[Row]]
    backward: Callable[..., Sequence[Row]]
    state: ArrayLayout
    params: list[ArrayLayout]
    xs: list[ArrayLayout]
    closed_over: int
    param_arrays: tuple[jax.Array, ...]
    x_arrays: tuple[jax.Array, ...]


def is_float(x: Any) -> bool:
    """Return whether an array has a floating-point dtype, and therefore a cotangent."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def cell_program(cell: Cell, params: Any, xs: Any, h0: jax.Array) -> CellProgram:
    """Convert a cell and the arrays of a call.

    Raises:
      NotImplementedError: if the kernel does not support the cell or an array.
    """
    state_dtype, channels = h0.dtype, h0.shape[1]
    params_flat, xs_flat = jax.tree.leaves(params), jax.tree.leaves(xs)

    def like(x: jax.Array, lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[lead:], state_dtype if is_float(x) else x.dtype)

    closed = jax.make_jaxpr(cell)(
        jax.tree.map(lambda x: like(x, 0), params),
        like(h0, 1),
        jax.tree.map(lambda x: like(x, 2), xs),
    )
    closed_over = [jnp.asarray(c) for c in closed.consts]
    arrays = [*closed_over, *params_flat]

    def flat(*leaves: jax.Array) -> jax.Array:
        with_consts = ClosedJaxpr(closed.jaxpr, leaves[: len(closed_over)])
        return jaxpr_as_fun(with_consts)(*leaves[len(closed_over) :])[0]

    of_params = [array_layout(x.shape, channels) for x in arrays]
    of_xs = [array_layout(x.shape[2:], channels) for x in xs_flat]
    state = ArrayLayout(h0.shape[1:], 0)
    for x, layout in zip(xs_flat, of_xs, strict=True):
        if layout.axis is None:
            raise NotImplementedError(
                f"{OP}: `xs` must have an axis of D={channels} channels in the GPU kernel, got "
                f"{list(x.shape)}; broadcast it, or use implementation='xla' or None."
            )
    for x in (*arrays, *xs_flat):
        if x.dtype not in DTYPES:
            raise NotImplementedError(
                f"{OP}: arrays of the GPU kernel must be {', '.join(DTYPES)}, got {x.dtype}; use "
                "implementation='xla' or None."
            )
    forward, backward = by_channel(
        flat,
        [*of_params, state, *of_xs],
        [like(x, 0).dtype for x in (*arrays, h0, *xs_flat)],
        Sizes(channels, BLOCK_FEATURES),
    )
    return CellProgram(
        forward,
        backward,
        state,
        of_params,
        of_xs,
        len(closed_over),
        tuple(
            layout.channels_last(x[None], channels)
            for layout, x in zip(of_params, arrays, strict=True)
        ),
        tuple(layout.channels_last(x, channels) for layout, x in zip(of_xs, xs_flat, strict=True)),
    )
