"""Mamba's selective scan on GPU: states stay in registers, inputs and outputs pass once.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t        h [N, D]
    y_t = sum_n C_t[n] h_t[n] + D x_t

A thread block has 128 features of one sequence, one for each thread, and iterates over all of time.
A thread has the N states of its feature, and B_t[n] and C_t[n] are equal for all threads of a
block. The copy engine (TMA) prefetches blocks of time to shared memory. States are stored only at
the borders of blocks of 64 steps, as residuals of the backward pass (`gpu_backward`). The kernels
use Mosaic GPU and require Hopper or newer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma
from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.jax_compat import array_like, pl
from pallas_kernels.selective_scan import BORDER_STEPS, border_shape
from pallas_kernels.selective_scan.gpu_backward import backward
from pallas_kernels.selective_scan.gpu_step import (
    GROUP,
    BlockLayout,
    Refs,
    State,
    binary_exponents,
    check,
    fetch,
    if_valid,
    next_state,
    read_state,
    ring_buffer,
    step_bytes,
    timed_arrays,
)
from pallas_kernels.vmem_rows import fold_rows, groups_in_block

__all__ = ["backward", "forward"]


class GlobalMemory(NamedTuple):
    """References to the arrays in global memory.

    Attributes:
      timed: inputs with a time axis, by name.
      A, D, h0: inputs without a time axis.
      y, final: outputs.
      borders: states before each block of 64 steps, None if they are not saved.
    """

    timed: Refs
    A: Any
    D: Any
    h0: Any
    y: Any
    final: Any
    borders: Any = None


class SharedMemory(NamedTuple):
    """Buffers and barriers in shared memory.

    Attributes:
      A, D: the thread block's columns of A and D.
      fixed_barrier: completed when A, D and the initial state have arrived.
      timed_barriers: one for each slot of the ring.
      ring: blocks of the timed inputs, by name.
      state: a state, on its way from or to global memory.
      y: blocks of outputs.
    """

    A: Any
    D: Any
    fixed_barrier: Any
    timed_barriers: Any
    ring: dict[str, Any]
    state: Any
    y: Any


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute outputs, final state, and with `save_states` the states before blocks of 64 steps.

    Arguments and results are those of the TPU kernel. `interpret` runs the kernel without a GPU.

    Raises:
      NotImplementedError: if the size of a row is not a multiple of 16 bytes, or N is above 16.
    """
    state_dtype, (batch, length, width), states = h0.dtype, x.shape, A.shape[0]
    check(states, x, dt, h0)
    timed = timed_arrays({"x": x, "dt": dt, "B": B, "C": C}, reset)
    fixed = {"A": binary_exponents(A), "D": D[0], "h0": h0}
    outputs = {"y": array_like(x, x.shape, x.dtype), "final": array_like(x, h0.shape, state_dtype)}
    if save_states:
        shape = border_shape((batch, length, width, states))
        outputs["borders"] = array_like(x, shape, state_dtype)

    input_bytes, output_bytes = step_bytes(timed), BLOCK_FEATURES * x.dtype.itemsize
    block_length = tma.preferred_block_length(length, input_bytes, output_bytes)
    # At most 32 steps, so that a border has been stored before the next one is written.
    block_length = min(32, max(GROUP, block_length))
    state_bytes = 2 * (states + 1) * BLOCK_FEATURES * state_dtype.itemsize
    room = tma.SMEM_HALF - state_bytes - tma.OUTPUT_SLOTS * block_length * output_bytes
    depth = min(
        tma.MAX_PREFETCH_DEPTH, -(-length // block_length), room // (block_length * input_bytes)
    )
    layout = BlockLayout(length, width, states, block_length, depth, interpret)
    smem = SharedMemory(
        A=plgpu.SMEM((states, BLOCK_FEATURES), state_dtype),
        D=plgpu.SMEM((BLOCK_FEATURES,), state_dtype),
        fixed_barrier=plgpu.Barrier(num_arrivals=len(fixed)),
        timed_barriers=plgpu.Barrier(num_arrivals=len(timed), num_barriers=depth),
        ring=ring_buffer(timed, depth, block_length),
        state=plgpu.SMEM((states, BLOCK_FEATURES), state_dtype),
        y=plgpu.SMEM((tma.OUTPUT_SLOTS, block_length, BLOCK_FEATURES), x.dtype),
    )

    def kernel(*refs: Any, smem: SharedMemory) -> None:
        by_name = dict(zip([*fixed, *outputs], refs[len(timed) :], strict=True))
        gmem = GlobalMemory(timed=dict(zip(timed, refs, strict=False)), **by_name)
        _forward(layout, gmem, smem)

    out = tma.launch(
        kernel,
        (*timed.values(), *fixed.values()),
        list(outputs.values()),
        {"smem": smem},
        batch * layout.column_blocks,
        name="selective_scan",
        interpret=interpret,
        approximate_math=True,  # errors of 2 units in the last place, and no subnormal numbers
    )
    return out[0], out[1], out[2] if save_states else None


def _forward(layout: BlockLayout, gmem: GlobalMemory, smem: SharedMemory) -> None:
    sequence, column = tma.sequence_and_column(layout.column_blocks)
    columns = pl.ds(column * BLOCK_FEATURES, BLOCK_FEATURES)
    ring, depth = smem.ring, layout.prefetch_depth
    border_blocks = BORDER_STEPS // layout.block_length

    def fetch_block(block: Any) -> None:
        slot, start = lax.rem(block, jnp.int32(depth)), block * layout.block_length
        fetch(gmem.timed, ring, slot, sequence, start, columns, smem.timed_barriers)

    def store_state(target: Any, leading: tuple[Any, ...]) -> None:
        tma.store_tile(smem.state, target, leading, 0, layout.states, column)

    lax.fori_loop(0, depth, lambda i, _: fetch_block(i.astype(jnp.int32)), None)
    plgpu.copy_gmem_to_smem(gmem.A.at[:, columns], smem.A, smem.fixed_barrier)
    plgpu.copy_gmem_to_smem(gmem.D.at[columns], smem.D, smem.fixed_barrier)
    plgpu.copy_gmem_to_smem(gmem.h0.at[sequence, :, columns], smem.state, smem.fixed_barrier)
    plgpu.barrier_wait(smem.fixed_barrier)
    exponents, skip = read_state(smem.A, layout.states), smem.D[...]

    def block_of_time(i: Any, h: State) -> State:
        block = i.astype(jnp.int32)
        slot = lax.rem(block, jnp.int32(depth))
        output_slot = lax.rem(block, jnp.int32(tma.OUTPUT_SLOTS))
        plgpu.barrier_wait(smem.timed_barriers.at[slot])
        plgpu.wait_smem_to_gmem(tma.OUTPUT_SLOTS - 1, wait_read_only=True)
        group_count, valid_rows = groups_in_block(block, layout.block_length, layout.length, GROUP)

        def group(g: Any, h: State) -> State:
            def row(r: Any, h: State) -> State:
                t = g * GROUP + r
                after, x = next_state(ring, slot, t, h, exponents)
                y = skip * x
                for n, state in enumerate(after):
                    y = y + ring["C"][slot, t, n] * state
                smem.y[output_slot, t] = y.astype(smem.y.dtype)
                return if_valid(layout, t < valid_rows, after, h)

            return fold_rows(GROUP, row, h, reverse=False, unroll=not layout.interpret)

        if gmem.borders is not None:

            @pl.when(lax.rem(block, jnp.int32(border_blocks)) == 0)
            def _border() -> None:
                for n, state in enumerate(h):
                    smem.state[n] = state
                plgpu.commit_smem()
                store_state(gmem.borders, (sequence, lax.div(block, jnp.int32(border_blocks))))

        h = lax.fori_loop(0, group_count, group, h)
        plgpu.commit_smem()
        tile, start = smem.y.at[output_slot], block * layout.block_length
        tma.store_tile(tile, gmem.y, (sequence,), start, layout.length, column)
        plgpu.commit_smem_to_gmem_group()
        pl.when(block + depth < layout.time_blocks)(lambda: fetch_block(block + depth))
        return h

    h = lax.fori_loop(0, layout.time_blocks, block_of_time, read_state(smem.state, layout.states))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for n, state in enumerate(h):
        smem.state[n] = state
    plgpu.commit_smem()
    store_state(gmem.final, (sequence,))
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
