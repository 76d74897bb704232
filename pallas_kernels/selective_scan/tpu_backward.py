"""The backward pass of the selective scan on TPU, from the states at the borders of its blocks.

The pass takes blocks of time in reverse, by default of 64 steps. It recomputes the states of a
block in VMEM from the state at its border, and then runs the adjoint steps from the last to the
first. The cotangents of B and C are sums over D. They are computed at the end of a block, for all
rows of a group at once, so that registers are full.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import vmem_rows
from pallas_kernels.jax_compat import pl
from pallas_kernels.selective_scan import BORDER_STEPS, tpu_step
from pallas_kernels.selective_scan.tpu_step import Scratch, Specs, State, Variant


class Refs(NamedTuple):
    """References of the backward kernel; None for an absent array.

    Attributes:
      x, dt, dy, A, B, C, D, borders, d_final, reset: blocks of the inputs.
      dx, ddt, d_b, d_c, d_a, dh0, d_d: blocks of the outputs.
      h: states of the block, scratch [N, steps + 8, columns]; step r has the state before it in row
        7 + r and the state after it in row 8 + r.
      d_states: cotangents of the states after each step, scratch [N, steps, columns].
      carry: cotangent of the state before the block, scratch.
      wide_x, wide_dt, wide_dy, wide_dx, wide_ddt: rows of a group in the dtype of the state,
        scratch.
    """

    x: Any
    dt: Any
    dy: Any
    A: Any
    B: Any
    C: Any
    D: Any
    borders: Any
    d_final: Any
    dx: Any
    ddt: Any
    d_b: Any
    d_c: Any
    d_a: Any
    dh0: Any
    d_d: Any
    h: Any
    d_states: Any
    carry: Any
    reset: Any = None
    wide_x: Any = None
    wide_dt: Any = None
    wide_dy: Any = None
    wide_dx: Any = None
    wide_ddt: Any = None


def backward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    reset: jax.Array | None,
    borders: jax.Array,
    dy: jax.Array,
    d_final: jax.Array,
    *,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Compute the cotangents of (x, dt, A, B, C, D, h0), those of A to D in the state's dtype.

    `block_sizes` must have the steps with which `forward` computed `borders`. By default, columns
    are half as many as in `forward`, because the pass carries twice the numbers.
    """
    state_dtype, (batch, length, width) = borders.dtype, x.shape
    group_length = 8 if x.dtype == dt.dtype == dy.dtype == state_dtype else 16
    states = A.shape[0]
    steps, columns = block_sizes or (
        BORDER_STEPS,
        tpu_step.block_columns(width, states, registers=16),
    )
    variant = Variant(length, width, states, steps, columns, group_length, interpret)
    specs = Specs(variant, backwards=True)
    inputs = [
        ("x", x, specs.timed),
        ("dt", dt, specs.timed),
        ("dy", dy, specs.timed),
        ("A", tpu_step.binary_exponents(A), specs.exponents),
        ("B", B, specs.scalars),
        ("C", C, specs.scalars),
        ("D", D, specs.skip),
        ("borders", borders, specs.borders),
        ("d_final", d_final, specs.state),
    ]
    if reset is not None:
        inputs.append(("reset", vmem_rows.reset_blocks(reset, steps), specs.reset))
    sums = (batch, variant.column_blocks, length, states)
    outputs = [
        ("dx", x.shape, x.dtype, specs.timed),
        ("ddt", dt.shape, dt.dtype, specs.timed),
        ("d_b", sums, state_dtype, specs.sums),
        ("d_c", sums, state_dtype, specs.sums),
        ("d_a", d_final.shape, state_dtype, specs.state),
        ("dh0", d_final.shape, state_dtype, specs.state),
        ("d_d", (batch, 1, width), state_dtype, specs.row),
    ]
    scratch: Scratch = [
        ("h", (states, steps + 8, columns), state_dtype),
        ("d_states", (states, steps, columns), state_dtype),
        ("carry", (states, columns), state_dtype),
    ]
    dtypes = {"x": x.dtype, "dt": dt.dtype, "dy": dy.dtype, "dx": x.dtype, "ddt": dt.dtype}
    scratch += tpu_step.wide_rows(variant, state_dtype, dtypes)

    def kernel(refs: dict[str, Any]) -> None:
        _backward(variant, Refs(**refs))

    out = tpu_step.call_kernel(kernel, variant, inputs, outputs, scratch, "selective_scan_backward")
    return (
        out["dx"],
        out["ddt"],
        out["d_a"].sum(0),
        out["d_b"].sum(1),
        out["d_c"].sum(1),
        out["d_d"].sum(0),
        out["dh0"],
    )


def _backward(variant: Variant, refs: Refs) -> None:
    time = pl.program_id(2)
    block, group_length = variant.time_blocks - 1 - time, variant.group_length
    valid_columns = variant.width - pl.program_id(1) * variant.columns
    group_count, valid_rows = vmem_rows.groups_in_block(
        block, variant.steps, variant.length, group_length
    )
    step = functools.partial(tpu_step.next_state, refs.A, refs.B, refs.reset)
    reader = functools.partial(vmem_rows.row_reader, group_length=group_length)

    @pl.when(time == 0)
    def _start() -> None:
        refs.carry[...] = refs.d_final[...]
        refs.d_a[...] = jnp.zeros_like(refs.d_a)
        refs.d_d[...] = jnp.zeros_like(refs.d_d)

    def recompute(i: jax.Array, h: State) -> State:
        """Recompute the states of a group."""
        base = pl.multiple_of(i * group_length, group_length)
        x_row = reader(refs.x, refs.wide_x, base)
        dt_row = reader(refs.dt, refs.wide_dt, base)

        def row(r: Any, h: State) -> State:
            h = step(h, x_row(r), dt_row(r), base + r)
            for n, state in enumerate(h):
                refs.h[n, pl.ds(base + r + 8, 1), :] = state
            return h

        return vmem_rows.fold_rows(
            group_length, row, h, reverse=False, unroll=not variant.interpret
        )

    border = tpu_step.read_state(refs.borders, variant.states)
    for n, state in enumerate(border):
        refs.h[n, 7:8, :] = state
    lax.fori_loop(0, group_count, recompute, border)

    def adjoint(i: jax.Array, carry: Any) -> Any:
        """Run the adjoint steps of a group, on the cotangents of the state, of A and of D."""
        base = pl.multiple_of((group_count - 1 - i) * group_length, group_length)
        x_row = reader(refs.x, refs.wide_x, base)
        dt_row = reader(refs.dt, refs.wide_dt, base)
        dy_row = reader(refs.dy, refs.wide_dy, base)

        def row(r: Any, carry: Any) -> Any:
            d_state, dA, dD = carry
            t, x, dt, dy = base + r, x_row(r), dt_row(r), dy_row(r)
            reset = None if refs.reset is None else refs.reset[0, t] != 0
            d_write, ddt = jnp.zeros_like(x), jnp.zeros_like(x)
            d_previous, dA_after = [], []
            for n, old in enumerate(d_state):
                exponent = refs.A[n]
                total = old + refs.C[t, n] * dy
                refs.d_states[n, pl.ds(t, 1), :] = total
                d_write = d_write + refs.B[t, n] * total
                decayed = jnp.exp2(dt * exponent) * total
                change = decayed * refs.h[n, pl.ds(t + 7, 1), :]
                if reset is not None:
                    decayed, change = (
                        jnp.where(reset, jnp.zeros_like(v), v) for v in (decayed, change)
                    )
                ddt = ddt + change * exponent
                dA_after.append(dA[n] + change * dt)
                d_previous.append(decayed)
            ddt = ddt * math.log(2) + d_write * x
            vmem_rows.write_row(refs.ddt, refs.wide_ddt, base, r, ddt)
            vmem_rows.write_row(refs.dx, refs.wide_dx, base, r, d_write * dt + refs.D[...] * dy)
            new = (*d_previous, *dA_after, dD + dy * x)
            flat = tpu_step.if_valid(variant, t < valid_rows, new, (*d_state, *dA, dD))
            return flat[: variant.states], flat[variant.states : -1], flat[-1]

        carry = vmem_rows.fold_rows(
            group_length, row, carry, reverse=True, unroll=not variant.interpret
        )
        vmem_rows.flush_group(refs.dx, refs.wide_dx, base, group_length)
        vmem_rows.flush_group(refs.ddt, refs.wide_ddt, base, group_length)
        return carry

    carry = (
        tpu_step.read_state(refs.carry, variant.states),
        tpu_step.read_state(refs.d_a, variant.states),
    )
    d_state, dA, dD = lax.fori_loop(0, group_count, adjoint, (*carry, refs.d_d[...]))
    for n in range(variant.states):
        refs.carry[n : n + 1, :] = d_state[n]
        refs.d_a[n : n + 1, :] = dA[n]
    refs.d_d[...] = dD
    refs.dh0[...] = refs.carry[...]
    _sum_over_columns(variant, refs, group_count, valid_columns)


def _sum_over_columns(variant: Variant, refs: Refs, group_count: Any, valid_columns: Any) -> None:
    """Compute the cotangents of B and C of a block."""
    state_dtype, group_length = refs.carry.dtype, variant.group_length
    ragged = variant.width % variant.columns != 0
    lane = lax.broadcasted_iota(jnp.int32, (group_length, variant.columns), 1)
    component = lax.broadcasted_iota(jnp.int32, (group_length, variant.states), 1)

    def group(i: jax.Array, _: None) -> None:
        base = pl.multiple_of(i * group_length, group_length)
        rows = pl.ds(base, group_length)
        x, dt, dy = (ref[rows, :].astype(state_dtype) for ref in (refs.x, refs.dt, refs.dy))
        for out, states, state_rows, factor in (
            (refs.d_b, refs.d_states, rows, dt * x),
            (refs.d_c, refs.h, pl.ds(base + 8, group_length), dy),
        ):
            total = jnp.zeros((group_length, variant.states), state_dtype)
            for n in range(variant.states):
                product = states[n, state_rows, :] * factor
                if ragged:
                    product = jnp.where(lane < valid_columns, product, jnp.zeros_like(product))
                total = jnp.where(component == n, jnp.sum(product, axis=1, keepdims=True), total)
            out[rows, :] = total

    lax.fori_loop(0, group_count, group, None)
