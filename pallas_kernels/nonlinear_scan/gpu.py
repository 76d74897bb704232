"""Nonlinear cells on GPU, step by step in one pass, forward and backward: elementwise cells.

`gpu_dense` has the kernel of cells with matrices.

    h_t = f(h_{t-1}, x_t)
    adjoint:  w_t = g_t + c_{t+1};   (dp_t, c_t, dx_t) = w_t^T df(p, h_{t-1}, x_t)

g_t is the cotangent of h_t, dp_t is summed over time, and c_T+1 is the cotangent of the final
state. Where `reset` is true, h_{t-1} and c_t are zero. A thread has one channel of one sequence.
Its k numbers of state, its parameters and the sums of their cotangents stay in registers. The cell
is the user's function, which `cell_program` converts to rows of channels; JAX differentiates it.
`pipeline` has the copies. States of k > 1 numbers are [B, T, k, D] here, because the copy engine
copies whole rows of channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import pipeline
from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.gpu.pipeline import BlockLayout, BlockPosition, SharedMemory
from pallas_kernels.gpu.tma import broadcast_flag, memory_layout, zero_row
from pallas_kernels.nonlinear_scan import gpu_dense
from pallas_kernels.nonlinear_scan.cell_program import (
    Cell,
    Row,
    cell_program,
    is_float,
    multiplies,
)
from pallas_kernels.nonlinear_scan.cell_trace import OP
from pallas_kernels.selection import select, zero_where
from pallas_kernels.vmem_rows import fold_rows, groups_in_block


class StepPosition(NamedTuple):
    """Position of a step.

    Attributes:
      block: index of its block of time.
      input_slot: slot of the block in `timed_inputs`.
      output_slot: slot of the block in `timed_outputs`.
      t: row in the block.
      reset: whether the state is cleared before the step; None if there are no resets.
      valid: whether the step is before the end of the sequence; None if all are.
    """

    block: Any
    input_slot: Any
    output_slot: Any
    t: Any
    reset: Any
    valid: Any


def _block_layout(
    timed_inputs: pipeline.Arrays,
    timed_outputs: pipeline.Shapes,
    others: Sequence[pipeline.Arrays | pipeline.Shapes],
    reverse: bool,
    interpret: bool,
) -> BlockLayout:
    pipeline.check_alignment(OP, timed_inputs, timed_outputs, *others)
    _, length, *_, width = timed_inputs["xs"][0].shape
    block_length, depth = pipeline.choose_blocks(
        OP,
        length,
        width,
        pipeline.step_bytes(timed_inputs),
        pipeline.step_bytes(timed_outputs),
        None,
    )
    depth = min(depth, -(-length // block_length))
    return BlockLayout(length, block_length, depth, width, reverse, interpret)


def scan(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    save_states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute all states, step by step.

    Args:
      cell: f(params, h, x) -> h of one sequence: elementwise operations and products with matrices
        [D, D] of `params`; hashable or not.
      params: pytree of arrays. Each is a matrix, has an axis of D channels (the last axis of that
        length), or applies to all channels.
      xs: pytree of [B, T, ...] arrays with an axis of D channels.
      h0: [B, D] or [B, D, k], float32.
      reset: [B, T] bool or None.
      out_dtype: dtype of the states.
      save_states: whether to return the residuals of `adjoint`.
      interpret: run in interpret mode, without a GPU. This is slow.

    Returns:
      (states [B, T, D] or [B, T, D, k]; final state in the dtype of h0; residuals of `adjoint` in
      that dtype, [B, T, D] or [B, T, k, D], or None).

    Raises:
      NotImplementedError: if the kernel does not support the cell or an array.
    """
    if multiplies(cell, params, xs, h0):
        return gpu_dense.scan(
            cell,
            params,
            xs,
            h0,
            reset,
            out_dtype=out_dtype,
            save_states=save_states,
            interpret=interpret,
        )
    program, state_dtype = cell_program(cell, params, xs, h0, (BLOCK_FEATURES,)), h0.dtype
    batch, length = jax.tree.leaves(xs)[0].shape[:2]
    numbers, width = program.state.number_axis, h0.shape[1]

    def like(*shape: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct]:
        return (jax.ShapeDtypeStruct((batch, *shape, *numbers, width), dtype),)

    timed_inputs = {"xs": program.x_arrays}
    initial = program.state.channels_last(h0, width)
    fixed_inputs = {"params": program.param_arrays, "h0": (initial,)}
    timed_outputs = {"y": like(length, dtype=out_dtype)}
    final_outputs = {"final": like(dtype=state_dtype)}
    if save_states and jnp.dtype(out_dtype) != state_dtype:
        timed_outputs["states"] = like(length, dtype=state_dtype)
    layout = _block_layout(
        timed_inputs, timed_outputs, (fixed_inputs, final_outputs), False, interpret
    )

    def start(smem: SharedMemory) -> tuple[Any, Any]:
        fixed = smem.fixed_inputs
        return _read_rows(fixed["params"], state_dtype), _read_rows(fixed["h0"], state_dtype)

    def step(smem: SharedMemory, params: Any, at: StepPosition, h: Sequence[Row]) -> Sequence[Row]:
        previous = zero_where(at.reset, tuple(h))
        x = _read_rows(smem.timed_inputs["xs"], state_dtype, at.input_slot, at.t)
        following = program.forward(*params, *previous, *x)
        for refs in smem.timed_outputs.values():
            _write_rows(refs, at, following)
        return tuple(map(memory_layout, select(at.valid, tuple(following), tuple(h))))

    outputs = pipeline.run(
        OP,
        layout,
        pipeline.BlockProgram(
            start,
            functools.partial(_run_block, layout, step),
            lambda h: {"final": (_as_written(h),)},
        ),
        timed_inputs=timed_inputs,
        fixed_inputs=fixed_inputs,
        timed_outputs=timed_outputs,
        final_outputs=final_outputs,
        reset=reset,
    )
    y, final = (program.state.original_axes(outputs[name][0]) for name in ("y", "final"))
    return y, final, outputs.get("states", outputs["y"])[0] if save_states else None


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
    interpret: bool = False,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Compute the cotangents of the floating-point leaves of `params` and `xs`, and of h0.

    Args:
      cell, params, xs, h0, reset, interpret: as for `scan`.
      states: residuals of `scan`.
      d_states: cotangents of its states [B, T, D] or [B, T, D, k].
      d_final: cotangent of its final state.
    """
    if multiplies(cell, params, xs, h0):
        return gpu_dense.adjoint(
            cell, params, xs, h0, reset, states, d_states, d_final, interpret=interpret
        )
    program, state_dtype = cell_program(cell, params, xs, h0, (BLOCK_FEATURES,)), h0.dtype
    (batch, width), state = h0.shape[:2], program.state
    timed_inputs = {
        "xs": program.x_arrays,
        "states": (states,),
        "ct": (state.channels_last(d_states, width),),
    }
    fixed_inputs = {
        "params": program.param_arrays,
        "h0": (state.channels_last(h0, width),),
        "d_final": (state.channels_last(d_final, width),),
    }
    differentiated = [
        i for i, x in enumerate(program.param_arrays) if is_float(x) and i >= program.closed_over
    ]
    timed_outputs = {
        "d_xs": tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.x_arrays if is_float(x)
        )
    }
    final_outputs = {
        "d_h0": (jax.ShapeDtypeStruct((batch, *state.number_axis, width), state_dtype),),
        "d_params": tuple(
            jax.ShapeDtypeStruct((batch, *program.params[i].number_axis, width), state_dtype)
            for i in differentiated
        ),
    }
    layout = _block_layout(
        timed_inputs, timed_outputs, (fixed_inputs, final_outputs), True, interpret
    )
    # The cotangents start with rows of closed-over arrays, which are dropped, and then have the
    # rows of the parameters.
    param_rows = sum(program.params[i].size for i in differentiated)

    def start(smem: SharedMemory) -> tuple[Any, Any]:
        fixed = {
            name: tuple(_read_rows(refs, state_dtype)) for name, refs in smem.fixed_inputs.items()
        }
        return fixed, (fixed["d_final"], tuple(zero_row(state_dtype) for _ in range(param_rows)))

    def step(smem: SharedMemory, fixed: Any, at: StepPosition, carry: Any) -> Any:
        d_state, totals = carry

        def read(name: str, *index: Any) -> tuple[Row, ...]:
            return _read_rows(smem.timed_inputs[name], state_dtype, at.input_slot, *index)

        first = select(broadcast_flag(at.block == 0), fixed["h0"], read("edge"))
        before = read("states", jnp.maximum(at.t - 1, 0))
        previous = zero_where(at.reset, select(broadcast_flag(at.t == 0), first, before))
        weights = [ct + c for ct, c in zip(read("ct", at.t), d_state, strict=True)]
        x = read("xs", at.t)
        cotangents = tuple(program.backward(*fixed["params"], *previous, *x, *weights))[
            program.dropped :
        ]
        d_params, rest = cotangents[:param_rows], cotangents[param_rows:]
        d_h, d_xs = rest[: state.size], rest[state.size :]
        _write_rows(smem.timed_outputs["d_xs"], at, d_xs)
        following = select(at.valid, zero_where(at.reset, d_h), d_state)
        sums = tuple(t + d for t, d in zip(totals, d_params, strict=True))
        sums = select(at.valid, sums, totals)
        return tuple(map(memory_layout, following)), tuple(map(memory_layout, sums))

    def finish(carry: Any) -> dict[str, tuple[Any, ...]]:
        d_h0, totals = carry
        rest, d_params = list(totals), []
        for i in differentiated:
            d_params.append(_as_written(rest[: program.params[i].size]))
            rest = rest[program.params[i].size :]
        return {"d_h0": (_as_written(d_h0),), "d_params": tuple(d_params)}

    outputs = pipeline.run(
        f"{OP}_adjoint",
        layout,
        pipeline.BlockProgram(start, functools.partial(_run_block, layout, step), finish),
        timed_inputs=timed_inputs,
        fixed_inputs=fixed_inputs,
        timed_outputs=timed_outputs,
        final_outputs=final_outputs,
        reset=reset,
        edge="states",
    )
    totals = [jnp.sum(ct, 0).reshape(-1, width) for ct in outputs["d_params"]]
    d_params = program.leaf_cotangents((), totals)
    of_xs = [at for at, x in zip(program.xs, program.x_arrays, strict=True) if is_float(x)]
    d_xs = [at.original_axes(ct) for at, ct in zip(of_xs, outputs["d_xs"], strict=True)]
    return d_params, d_xs, state.original_axes(outputs["d_h0"][0])


def _run_block(
    layout: BlockLayout,
    step: Callable[[SharedMemory, Any, StepPosition, Any], Any],
    smem: SharedMemory,
    fixed: Any,
    position: BlockPosition,
    carry: Any,
) -> Any:
    """Run the steps of a block of time."""
    group_count, valid_rows = groups_in_block(
        position.block, layout.block_length, layout.length, layout.group_length
    )

    def group(i: Any, carry: Any) -> Any:
        base = (group_count - 1 - i if layout.reverse else i) * layout.group_length

        def row(r: Any, carry: Any) -> Any:
            t, reset = base + r, None
            if "reset" in smem.timed_inputs:
                reset = broadcast_flag(smem.timed_inputs["reset"][0][position.input_slot, t] != 0)
            valid = broadcast_flag(t < valid_rows) if layout.length % layout.group_length else None
            return step(smem, fixed, StepPosition(*position, t, reset, valid), carry)

        return fold_rows(
            layout.group_length, row, carry, reverse=layout.reverse, unroll=not layout.interpret
        )

    return lax.fori_loop(0, group_count, group, carry)


def _read_rows(refs: Sequence[Any], state_dtype: Any, *index: Any) -> tuple[Row, ...]:
    """Read the rows of all arrays at an index, floating-point rows in the dtype of the state."""
    rows = []
    for ref in refs:
        several = len(ref.shape) - len(index) == 2
        for r in range(ref.shape[-2]) if several else [...]:
            row = ref[(*index, r)]
            rows.append(row.astype(state_dtype) if is_float(ref) else row)
    return tuple(rows)


def _write_rows(refs: Sequence[Any], at: StepPosition, rows: Sequence[Row]) -> None:
    """Write the rows of a step to all arrays."""
    rest = iter(rows)
    for ref in refs:
        for r in range(ref.shape[2]) if len(ref.shape) == 4 else [...]:
            ref[(at.output_slot, at.t, r)] = next(rest).astype(ref.dtype)


def _as_written(rows: Sequence[Row]) -> Any:
    """Return the rows of a final output: a list, or the row itself if there is one."""
    return rows[0] if len(rows) == 1 else list(rows)
