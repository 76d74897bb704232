"""Mamba's selective scan on TPU: states stay in registers, inputs and outputs pass once.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t        h [N, D]
    y_t = sum_n C_t[n] h_t[n] + D x_t

A row [1, D] of x or dt fills whole registers. Each of the N components of the state is therefore
such a row, and B_t[n], C_t[n] are scalars in SMEM. No step broadcasts along an axis or sums over
one. States are stored only at the borders of blocks of time, as residuals of the backward pass
(`tpu_backward`).
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax

from pallas_kernels import vmem_rows
from pallas_kernels.jax_compat import pl
from pallas_kernels.selective_scan import BORDER_STEPS, border_shape, tpu_step
from pallas_kernels.selective_scan.tpu_backward import backward
from pallas_kernels.selective_scan.tpu_step import Scratch, Specs, State, Variant

__all__ = ["backward", "forward"]


class Refs(NamedTuple):
    """References of the forward kernel; None for an absent array.

    Attributes:
      x, dt, A, B, C, D, h0, reset: blocks of the inputs.
      y, final, borders: blocks of the outputs.
      h: the carried state, scratch.
      wide_x, wide_dt, wide_y: rows of a group in the dtype of the state, scratch.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    h0: Any
    y: Any
    final: Any
    h: Any
    reset: Any = None
    borders: Any = None
    wide_x: Any = None
    wide_dt: Any = None
    wide_y: Any = None


def forward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    save_states: bool,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute outputs, final state, and with `save_states` the states before blocks of time.

    Args:
      x: [B, T, D].
      dt: [B, T, D].
      A: [N, D] in the dtype of the state.
      B: [B, T, N] in the dtype of the state.
      C: [B, T, N] in the dtype of the state.
      D: [1, D] in the dtype of the state.
      h0: [B, N, D], which determines the dtype of the state.
      reset: [B, T] bool or None.
      save_states: whether to return the residuals of `backward`.
      block_sizes: steps (a multiple of 16) and columns of D (a multiple of 128, or all) of a block.
        By default 64 steps, and columns whose states fit half of the registers.
      interpret: run in interpret mode, without a TPU. This is slow.

    Returns:
      (y [B, T, D] in the dtype of x, final state [B, N, D], [B, blocks, N, D] or None).
    """
    state_dtype, (batch, length, width) = h0.dtype, x.shape
    group_length = 8 if x.dtype == dt.dtype == state_dtype else 16
    states = A.shape[0]
    steps, columns = block_sizes or (
        BORDER_STEPS,
        tpu_step.block_columns(width, states, registers=32),
    )
    variant = Variant(length, width, states, steps, columns, group_length, interpret)
    specs = Specs(variant, backwards=False)
    inputs = [
        ("x", x, specs.timed),
        ("dt", dt, specs.timed),
        ("A", tpu_step.binary_exponents(A), specs.exponents),
        ("B", B, specs.scalars),
        ("C", C, specs.scalars),
        ("D", D, specs.skip),
        ("h0", h0, specs.state),
    ]
    if reset is not None:
        inputs.append(("reset", vmem_rows.reset_blocks(reset, steps), specs.reset))
    outputs = [
        ("y", x.shape, x.dtype, specs.timed),
        ("final", h0.shape, state_dtype, specs.state),
    ]
    if save_states:
        shape = border_shape((batch, length, width, states), steps)
        outputs.append(("borders", shape, state_dtype, specs.borders))
    scratch: Scratch = [("h", (states, columns), state_dtype)]
    scratch += tpu_step.wide_rows(
        variant, state_dtype, {"x": x.dtype, "dt": dt.dtype, "y": x.dtype}
    )

    def kernel(refs: dict[str, Any]) -> None:
        _forward(variant, Refs(**refs))

    out = tpu_step.call_kernel(kernel, variant, inputs, outputs, scratch, "selective_scan")
    return out["y"], out["final"], out.get("borders")


def _forward(variant: Variant, refs: Refs) -> None:
    block, group_length = pl.program_id(2), variant.group_length

    @pl.when(block == 0)
    def _start() -> None:
        refs.h[...] = refs.h0[...]

    if refs.borders is not None:
        refs.borders[...] = refs.h[...]
    group_count, valid_rows = vmem_rows.groups_in_block(
        block, variant.steps, variant.length, group_length
    )
    step = functools.partial(tpu_step.next_state, refs.A, refs.B, refs.reset)

    def group(i: jax.Array, h: State) -> State:
        base = pl.multiple_of(i * group_length, group_length)
        x_row = vmem_rows.row_reader(refs.x, refs.wide_x, base, group_length)
        dt_row = vmem_rows.row_reader(refs.dt, refs.wide_dt, base, group_length)

        def row(r: Any, h: State) -> State:
            x = x_row(r)
            after = step(h, x, dt_row(r), base + r)
            y = refs.D[...] * x
            for n, state in enumerate(after):
                y = y + refs.C[base + r, n] * state
            vmem_rows.write_row(refs.y, refs.wide_y, base, r, y)
            return tpu_step.if_valid(variant, base + r < valid_rows, after, h)

        h = vmem_rows.fold_rows(group_length, row, h, reverse=False, unroll=not variant.interpret)
        vmem_rows.flush_group(refs.y, refs.wide_y, base, group_length)
        return h

    h = lax.fori_loop(0, group_count, group, tpu_step.read_state(refs.h, variant.states))
    for n, state in enumerate(h):
        refs.h[n : n + 1, :] = state
    refs.final[...] = refs.h[...]
