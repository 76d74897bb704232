"""The elementwise linear recurrence on GPU: one pass over the arrays, forward and backward.

A thread has one feature of one sequence, with the state in registers. Every element is read once
and written once. The copies hide the arithmetic, provided that B x D / 128 thread blocks saturate
the memory. If they do not, time is split over more thread blocks (`gpu_split_time`). `pipeline` has
the copies, and `forms` the equations.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import pipeline
from pallas_kernels.gpu.pipeline import BlockLayout, BlockPosition, SharedMemory
from pallas_kernels.gpu.tma import broadcast_flag, zero_row
from pallas_kernels.linear_scan import forms, gpu_split_time, time_segments
from pallas_kernels.linear_scan.forms import Numbers, Pass, PassResult
from pallas_kernels.selection import select, zero_where
from pallas_kernels.vmem_rows import fold_rows, groups_in_block

Carry = tuple[Numbers, Numbers]


class Variant(NamedTuple):
    """Specialization of a kernel, next to its block layout.

    Attributes:
      post: whether this is the `post` form.
      a_in_time: whether `a` has a time axis.
      sums_da: whether the cotangent of `a` is summed over time.
      summary: whether the kernel computes only the final state and the product of the decays.
      state_dtype: dtype of the state.
    """

    post: bool
    a_in_time: bool
    sums_da: bool
    summary: bool
    state_dtype: Any


def run_single_pass(call: Pass, summary: bool = False) -> PassResult:
    """Run one kernel. For a summary, `y` is () and `da` is the product of the decays."""
    batch, length, width = call.x[0].shape
    state_dtype, parts = call.h0[0].dtype, len(call.x)
    a_shape = call.a[0].shape
    a_in_time, shared_by_batch = a_shape[1] > 1 or length == 1, a_shape[0] < batch

    def like(*shape: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((batch, *shape, width), dtype),) * parts

    timed_outputs = {"y": like(length, dtype=call.out_dtype)}
    final_outputs = {"final": like(dtype=state_dtype)}
    if summary:
        timed_outputs, final_outputs["product"] = {}, final_outputs["final"]
    if call.states is not None and a_in_time:  # `forms.adjoint` sums it over the batch
        timed_outputs["da"] = like(
            length, dtype=state_dtype if shared_by_batch else call.a[0].dtype
        )
    elif call.states is not None:
        final_outputs["da"] = like(dtype=state_dtype)
    timed_inputs: dict[str, Numbers] = {"x": call.x}
    fixed_inputs: dict[str, Numbers] = {"h0": call.h0}
    if a_in_time:
        timed_inputs["a"] = call.a
    else:
        fixed_inputs["a"] = tuple(p[:, 0] for p in call.a)
    if call.states is not None:
        timed_inputs["states"], fixed_inputs["start"] = call.states

    name = "linear_scan" + ("_summary" if summary else "" if call.states is None else "_adjoint")
    pipeline.check_alignment(
        "linear_scan", timed_inputs, fixed_inputs, timed_outputs, final_outputs
    )
    block_length, depth = pipeline.choose_blocks(
        "linear_scan",
        length,
        width,
        pipeline.step_bytes(timed_inputs),
        pipeline.step_bytes(timed_outputs),
        call.block_sizes,
    )
    depth = min(depth, -(-length // block_length))
    layout = BlockLayout(length, block_length, depth, width, call.reverse, call.interpret)
    variant = Variant(call.post, a_in_time, "da" in final_outputs, summary, state_dtype)
    outputs = pipeline.run(
        name,
        layout,
        pipeline.BlockProgram(
            functools.partial(_start, variant),
            functools.partial(_run_block, layout, variant),
            lambda carry: dict(zip(("final", "product" if summary else "da"), carry, strict=True)),
        ),
        timed_inputs=timed_inputs,
        fixed_inputs=fixed_inputs,
        timed_outputs=timed_outputs,
        final_outputs=final_outputs,
        reset=call.reset,
        edge=None if call.states is None else "states",
    )
    if summary:
        return PassResult((), outputs["final"], outputs["product"])
    da = outputs.get("da", ())
    da = da if a_in_time else tuple(p[:, None] for p in da)
    return PassResult(outputs["y"], outputs["final"], da)


def run_pass(call: Pass) -> PassResult:
    """Run a pass in one kernel, or in two where time is split over thread blocks."""
    segments = time_segments(*call.x[0].shape)
    if segments == 1:
        return run_single_pass(call)
    return gpu_split_time.run_in_segments(run_single_pass, segments, call)


scan = functools.partial(forms.scan, run_pass)
adjoint = functools.partial(forms.adjoint, run_pass)


def _start(variant: Variant, smem: SharedMemory) -> tuple[dict[str, Numbers], Carry]:
    """Return the fixed inputs, and (state, sum of da or product of decays) before the pass."""
    fixed = {
        name: tuple(ref[...].astype(variant.state_dtype) for ref in refs)
        for name, refs in smem.fixed_inputs.items()
    }
    h: Numbers = fixed["h0"]
    total: Numbers = ()
    if variant.summary:
        total = tuple(zero_row(variant.state_dtype) + one for one in (1, 0)[: len(h)])
    elif variant.sums_da:
        total = tuple(zero_row(variant.state_dtype) for _ in h)
    return fixed, (h, total)


def _run_block(
    layout: BlockLayout,
    variant: Variant,
    smem: SharedMemory,
    fixed: dict[str, Numbers],
    position: BlockPosition,
    carry: Carry,
) -> Carry:
    """Take (state, sum of da or product of decays) through a block of time."""
    timed, (block, input_slot, output_slot) = smem.timed_inputs, position
    group_count, valid_rows = groups_in_block(
        block, layout.block_length, layout.length, layout.group_length
    )

    def load(name: str, *index: Any) -> Numbers:
        return tuple(ref[(input_slot, *index)].astype(variant.state_dtype) for ref in timed[name])

    def store(name: str, t: Any, value: Numbers) -> None:
        for ref, part in zip(smem.timed_outputs[name], value, strict=True):
            ref[output_slot, t] = part.astype(ref.dtype)

    if "edge" in timed:
        # The state before the first step of this block in the direction of the differentiated
        # form, and the row of that step.
        first_block = block == (0 if layout.reverse else layout.time_blocks - 1)
        edge = select(broadcast_flag(first_block), fixed["start"], load("edge"))
        edge_row = 0 if layout.reverse else jnp.minimum(valid_rows, layout.block_length) - 1

    def group(i: Any, carry: Carry) -> Carry:
        base = (group_count - 1 - i if layout.reverse else i) * layout.group_length

        def row(r: Any, carry: Carry) -> Carry:
            h, total = carry
            t = base + r
            a, x = load("a", t) if variant.a_in_time else fixed["a"], load("x", t)
            reset = None
            if "reset" in timed:
                reset = broadcast_flag(timed["reset"][0][input_slot, t] != 0)
            valid = broadcast_flag(t < valid_rows) if layout.length % layout.group_length else None
            y, following = forms.advance(variant.post, h, a, x, reset)
            following = select(valid, following, h)
            if variant.summary:
                product = zero_where(reset, forms.multiply(a, total))
                return following, select(valid, product, total)
            store("y", t, y)
            if "edge" in timed:
                before = jnp.clip(t - 1 if layout.reverse else t + 1, 0, layout.block_length - 1)
                previous = select(broadcast_flag(t == edge_row), edge, load("states", before))
                da = zero_where(reset, forms.multiply(y, previous))
                if variant.a_in_time:
                    store("da", t, da)
                else:
                    total = select(valid, forms.add(total, da), total)
            return following, total

        return fold_rows(
            layout.group_length, row, carry, reverse=layout.reverse, unroll=not layout.interpret
        )

    return lax.fori_loop(0, group_count, group, carry)
