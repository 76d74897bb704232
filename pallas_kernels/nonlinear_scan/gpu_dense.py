"""Nonlinear cells with matrices on GPU, step by step in one pass, forward and backward.

    h_t = f(h_{t-1}, x_t)
    adjoint:  w_t = g_t + c_{t+1};   (dp_t, c_t, dx_t) = w_t^T df(p, h_{t-1}, x_t)

g_t is the cotangent of h_t, dp_t is summed over time, and c_{T+1} is the cotangent of the final
state. Where `reset` is true, h_{t-1} and c_t are zero.

A thread block has 8 to 32 sequences, and iterates over all of time. Channels are the rows of a
product, so a small batch does not leave rows of the tensor cores empty. `gpu_dense_kernel` has the
kernel, and `gpu_dense_layout` the layout of arrays and the sizes that fit.

The backward kernel writes both factors of the cotangents of the matrices at every step. XLA
multiplies them after the kernel, with a sum over steps and sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.nonlinear_scan import gpu_dense_kernel
from pallas_kernels.nonlinear_scan.cell_program import (
    Cell,
    CellProgram,
    Row,
    cell_program,
    is_float,
    widened,
)
from pallas_kernels.nonlinear_scan.cell_trace import OP
from pallas_kernels.nonlinear_scan.gpu_dense_kernel import Call, Step
from pallas_kernels.nonlinear_scan.gpu_dense_layout import count_pieces
from pallas_kernels.nonlinear_scan.row_function import RowFunction, row_function
from pallas_kernels.selection import zero_where


def scan(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    save_states: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute all states, step by step. Arguments and results are those of `gpu.scan`."""
    program = cell_program(cell, params, xs, h0, (8, h0.shape[1]))
    state = program.state
    call = Call(
        OP,
        program,
        _function(program, h0.dtype, program.forward),
        {"xs": list(program.x_arrays)},
        {"y": [(state.size, jnp.dtype(out_dtype))]},
        reset,
        _pieces(program),
    )
    if save_states and jnp.dtype(out_dtype) != h0.dtype:
        call.outputs["states"] = [(state.size, h0.dtype)]

    def step(s: Step, h: Sequence[Row]) -> list[Row]:
        following = s.evaluate([*s.params, *zero_where(s.reset, tuple(h)), *s.rows["xs"]])
        for name in call.outputs:
            s.write(name, following)
        return following

    first = state.channels_last(h0, h0.shape[1])
    outputs, last = gpu_dense_kernel.run(call, step, first, reverse=False, interpret=interpret)

    def in_layout(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], *state.number_axis, x.shape[-1])

    y, last = in_layout(outputs["y"][0]), in_layout(last)
    states = in_layout(outputs["states"][0]) if "states" in outputs else y
    return state.original_axes(y), state.original_axes(last), states if save_states else None


def adjoint(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    states: jax.Array,
    d_states: jax.Array,
    d_final: jax.Array,
    *,
    interpret: bool,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Compute all cotangents. Arguments and results are those of `gpu.adjoint`."""
    channels = h0.shape[1]
    program = cell_program(cell, params, xs, h0, (8, channels))
    state, slots = program.state, list(dict.fromkeys(program.slots))
    given = len(program.matrices) + sum(s.size for s in (*program.params, state, *program.xs))

    def backward(*args: Any) -> list[Any]:
        operands = dict(zip(program.slots, program.operands(*args[:given]), strict=True))
        return [*program.backward(*args)[program.dropped :], *(operands[n] for n in slots)]

    taps = [
        product.result.dtype
        for product, tap in zip(program.products, program.taps, strict=True)
        for _ in range(tap.size)
    ]
    first, ct, last = (state.channels_last(x, channels) for x in (h0, d_states, d_final))
    before = jnp.concatenate([first[:, None], states[:, :-1]], axis=1)
    moving = [(x, s) for x, s in zip(program.x_arrays, program.xs, strict=True) if is_float(x)]
    pieces = _pieces(program)
    factor = jnp.dtype(jnp.bfloat16 if pieces == 1 else h0.dtype)
    call = Call(
        f"{OP}_adjoint",
        program,
        _function(program, h0.dtype, backward, [*taps, *[h0.dtype] * state.size]),
        {"xs": list(program.x_arrays), "before": [before], "ct": [ct]},
        {
            "d_xs": [(s.size, x.dtype) for x, s in moving],
            "results": [(len(program.slots), factor)],
            "operands": [(len(slots), factor)],
        },
        reset,
        pieces,
    )
    summed = [program.params[n].size for is_matrix, n in program.leaves if not is_matrix]
    sizes = (sum(summed), state.size, sum(s.size for _, s in moving), len(taps), len(slots))

    def step(s: Step, carry: Sequence[Row]) -> list[Row]:
        c, totals = carry[: state.size], carry[state.size :]
        previous = zero_where(s.reset, tuple(s.rows["before"]))
        weights = [g + later for g, later in zip(s.rows["ct"], c, strict=True)]
        args = [*s.params, *previous, *s.rows["xs"], *([0.0] * len(taps)), *weights]
        rest = iter(s.evaluate(args))
        added, earlier, *written = ([next(rest) for _ in range(n)] for n in sizes)
        for name, rows in zip(call.outputs, written, strict=True):
            s.write(name, rows)
        sums = (total + row for total, row in zip(totals, added, strict=True))
        return [*zero_where(s.reset, tuple(earlier)), *sums]

    batch = h0.shape[0]
    carry = jnp.concatenate(
        [last.reshape(batch, -1, channels), jnp.zeros((batch, sum(summed), channels), h0.dtype)], 1
    )
    outputs, ends = gpu_dense_kernel.run(call, step, carry, reverse=True, interpret=interpret)
    [results], [operands] = outputs["results"], outputs["operands"]
    d_matrices = [jnp.zeros((channels, channels), h0.dtype) for _ in program.matrices]
    row = 0
    for product, tap in zip(program.products, program.taps, strict=True):
        for _ in range(tap.size):
            left, right = operands[:, :, slots.index(program.slots[row])], results[:, :, row]
            if product.summed:
                left, right = right, left
            d_matrices[product.matrix] += lax.dot_general(
                left,
                right,
                (((0, 1), (0, 1)), ((), ())),
                precision=None if pieces == 1 else product.precision,
                preferred_element_type=h0.dtype,
            )
            row += 1
    totals = jnp.split(jnp.sum(ends[:, state.size :], 0), np.cumsum(summed)[:-1]) if summed else ()
    d_h0 = ends[:, : state.size].reshape(batch, *state.number_axis, channels)
    d_xs = [
        s.original_axes(ct.reshape(*ct.shape[:2], *s.number_axis, channels))
        for ct, (_, s) in zip(outputs["d_xs"], moving, strict=True)
    ]
    return program.leaf_cotangents(d_matrices, totals), d_xs, state.original_axes(d_h0)


def _pieces(program: CellProgram) -> int:
    narrow = all(x.dtype == jnp.bfloat16 for x in program.x_arrays if is_float(x))
    return count_pieces((product.precision for product in program.products), narrow)


def _function(
    program: CellProgram,
    state_dtype: Any,
    function: Callable[..., Sequence[Any]],
    others: Sequence[Any] = (),
) -> RowFunction:
    """Trace a function of a cell's arguments, and of rows of the dtypes `others`."""
    like = jax.ShapeDtypeStruct
    row = (8, program.matrices[0].shape[0])
    dtypes = [
        widened(x, state_dtype)
        for x, s in zip(program.param_arrays, program.params, strict=True)
        for _ in range(s.size)
    ]
    dtypes += [state_dtype] * program.state.size
    dtypes += [
        widened(x, state_dtype)
        for x, s in zip(program.x_arrays, program.xs, strict=True)
        for _ in range(s.size)
    ]
    return row_function(
        function,
        [like(x.shape, widened(x, state_dtype)) for x in program.matrices],
        [like(row, dtype) for dtype in (*dtypes, *others)],
    )
