"""The backward pass of the selective scan on GPU, from the states at the borders of its blocks.

The pass takes blocks of 64 steps in reverse. A forward sweep through a block recomputes its states
from the state at its border, and leaves the states before each group of 8 steps in shared memory.
Then each group, last to first, recomputes its own states in registers and runs the adjoint steps.
The cotangents of B and C are sums over D. Their terms are transposed through shared memory, as one
row for each step and n, which one thread adds up. XLA adds the sums of the thread blocks.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma
from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.jax_compat import array_like, gpu_load, pl
from pallas_kernels.selective_scan import BORDER_STEPS
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
    reset_at,
    ring_buffer,
    step_bytes,
    timed_arrays,
)
from pallas_kernels.vmem_rows import fold_rows, groups_in_block

GROUPS = BORDER_STEPS // GROUP  # between two borders
PITCH = BLOCK_FEATURES + 4  # of transposed rows: 8 threads then read 16 bytes each from 32 banks


class GlobalMemory(NamedTuple):
    """References to the arrays in global memory: inputs, and outputs by name."""

    timed: Refs
    A: Any
    D: Any
    d_final: Any
    borders: Any
    outputs: Refs


class SharedMemory(NamedTuple):
    """Buffers and barriers in shared memory.

    Attributes:
      D: the thread block's columns of D, and at the end its cotangent.
      sweep_ring: groups of the inputs of the forward sweep, by name.
      border_barrier: completed when the state at a border has arrived.
      border: state at the border of the next block.
      fixed_barrier: completed when A, D and the final state's cotangent have arrived.
      states: states before each group of a block.
      tiles: groups of dx and ddt.
      timed_barriers: one for each slot of `ring`.
      sweep_barriers: one for each slot of `sweep_ring`.
      ring: groups of the inputs of the adjoint steps, by name.
      sums: groups of dB and dC.
      transposed: terms of dB or dC, a row for each step and n.
    """

    D: Any
    sweep_ring: dict[str, Any]
    border_barrier: Any
    border: Any
    fixed_barrier: Any
    states: Any
    tiles: dict[str, Any]
    timed_barriers: Any
    sweep_barriers: Any
    ring: dict[str, Any]
    sums: dict[str, Any]
    transposed: Any


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
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Compute the cotangents of (x, dt, A, B, C, D, h0), those of A to D in the state's dtype."""
    state_dtype, (batch, length, width), states = borders.dtype, x.shape, A.shape[0]
    check(states, x, dt, dy, borders)
    sweep = timed_arrays({"x": x, "dt": dt, "B": B}, reset)
    timed = timed_arrays({"x": x, "dt": dt, "B": B, "C": C, "dy": dy}, reset)
    fixed = {"A": binary_exponents(A), "D": D[0], "d_final": d_final, "borders": borders}
    padded_states = timed["B"].shape[-1]  # sums of a step
    group_count = -(-length // GROUP)
    column_blocks = -(-width // BLOCK_FEATURES)
    sums = (batch, column_blocks, group_count * GROUP * padded_states)
    shapes = {"dx": (x.shape, x.dtype), "ddt": (dt.shape, dt.dtype)}
    shapes |= {"dB": (sums, state_dtype), "dC": (sums, state_dtype)}
    shapes |= {"dA": (d_final.shape, state_dtype), "dh0": (d_final.shape, state_dtype)}
    shapes |= {"dD": ((batch, width), state_dtype)}
    outputs = {name: array_like(x, *like) for name, like in shapes.items()}

    rows = (GROUPS + 1) * states + PITCH + tma.OUTPUT_SLOTS * 2  # of 128 numbers, without the rings
    tile_bytes = GROUP * BLOCK_FEATURES * (x.dtype.itemsize + dt.dtype.itemsize)
    room = tma.SMEM_WHOLE - rows * BLOCK_FEATURES * state_dtype.itemsize
    room -= tma.OUTPUT_SLOTS * tile_bytes
    group_bytes = GROUP * (step_bytes(sweep) + step_bytes(timed))
    depth = min(tma.MAX_PREFETCH_DEPTH, group_count, room // group_bytes)
    smem = SharedMemory(
        D=plgpu.SMEM((BLOCK_FEATURES,), state_dtype),
        sweep_ring=ring_buffer(sweep, depth, GROUP),
        border_barrier=plgpu.Barrier(num_arrivals=1),
        border=plgpu.SMEM((states, BLOCK_FEATURES), state_dtype),
        fixed_barrier=plgpu.Barrier(num_arrivals=3),
        states=plgpu.SMEM((GROUPS, states, BLOCK_FEATURES), state_dtype),
        tiles={
            k: plgpu.SMEM((tma.OUTPUT_SLOTS, GROUP, BLOCK_FEATURES), shapes[k][1])
            for k in ("dx", "ddt")
        },
        timed_barriers=plgpu.Barrier(num_arrivals=len(timed), num_barriers=depth),
        sweep_barriers=plgpu.Barrier(num_arrivals=len(sweep), num_barriers=depth),
        ring=ring_buffer(timed, depth, GROUP),
        sums={k: plgpu.SMEM((tma.OUTPUT_SLOTS, BLOCK_FEATURES), state_dtype) for k in ("dB", "dC")},
        transposed=plgpu.SMEM((BLOCK_FEATURES, PITCH), state_dtype),
    )
    layout = BlockLayout(length, width, states, BORDER_STEPS, depth, interpret)

    def kernel(*refs: Any, smem: SharedMemory) -> None:
        by_name = dict(zip([*timed, *fixed, *outputs], refs, strict=True))
        gmem = GlobalMemory(
            timed={name: by_name[name] for name in timed},
            **{name: by_name[name] for name in fixed},
            outputs={name: by_name[name] for name in outputs},
        )
        _backward(layout, gmem, smem)

    out = tma.launch(
        kernel,
        (*timed.values(), *fixed.values()),
        list(outputs.values()),
        {"smem": smem},
        batch * column_blocks,
        name="selective_scan_backward",
        interpret=interpret,
        approximate_math=True,
    )
    results = dict(zip(outputs, out, strict=True))
    dB, dC = (
        results[k].reshape(batch, column_blocks, -1, padded_states).sum(1)[:, :length, :states]
        for k in ("dB", "dC")
    )
    dD = results["dD"].sum(0, keepdims=True)
    return results["dx"], results["ddt"], results["dA"].sum(0), dB, dC, dD, results["dh0"]


def _backward(layout: BlockLayout, gmem: GlobalMemory, smem: SharedMemory) -> None:
    sequence, column = tma.sequence_and_column(layout.column_blocks)
    columns, depth = pl.ds(column * BLOCK_FEATURES, BLOCK_FEATURES), layout.prefetch_depth
    state_dtype, total_groups = smem.states.dtype, -(-layout.length // GROUP)
    last_groups = total_groups - (layout.time_blocks - 1) * GROUPS  # groups of the last block
    # The sweep runs through all groups except the last one of each block.
    sweep_groups = (last_groups - 1) + (layout.time_blocks - 1) * (GROUPS - 1)

    def fetch_group(k: Any) -> None:
        """Start the copies of the k-th group from the end."""
        slot, start = lax.rem(k, jnp.int32(depth)), (total_groups - 1 - k) * GROUP
        fetch(gmem.timed, smem.ring, slot, sequence, start, columns, smem.timed_barriers)

    def fetch_sweep_group(k: Any) -> None:
        """Start the copies of the k-th group of the forward sweeps."""
        later = k - (last_groups - 1)
        before = lax.div(later, jnp.int32(GROUPS - 1))
        block = layout.time_blocks - 2 - before
        group = block * GROUPS + lax.rem(later, jnp.int32(GROUPS - 1))
        group = jnp.where(later < 0, (layout.time_blocks - 1) * GROUPS + k, group)
        slot, start = lax.rem(k, jnp.int32(depth)), group * GROUP
        fetch(gmem.timed, smem.sweep_ring, slot, sequence, start, columns, smem.sweep_barriers)

    def fetch_border(block: Any) -> None:
        source = gmem.borders.at[sequence, block, :, columns]
        plgpu.copy_gmem_to_smem(source, smem.border, smem.border_barrier)

    lax.fori_loop(0, min(depth, total_groups), lambda i, _: fetch_group(i.astype(jnp.int32)), None)
    lax.fori_loop(
        0, min(depth, sweep_groups), lambda i, _: fetch_sweep_group(i.astype(jnp.int32)), None
    )
    fetch_border(layout.time_blocks - 1)
    # A and the final state's cotangent pass through the buffer of the states, which is free.
    exponents_ref, d_final_ref = smem.states.at[0], smem.states.at[1]
    plgpu.copy_gmem_to_smem(gmem.A.at[:, columns], exponents_ref, smem.fixed_barrier)
    plgpu.copy_gmem_to_smem(gmem.d_final.at[sequence, :, columns], d_final_ref, smem.fixed_barrier)
    plgpu.copy_gmem_to_smem(gmem.D.at[columns], smem.D, smem.fixed_barrier)
    plgpu.barrier_wait(smem.fixed_barrier)
    exponents, d_final = (read_state(r, layout.states) for r in (exponents_ref, d_final_ref))
    skip = smem.D[...]

    def block_of_time(i: Any, carry: Any) -> Any:
        block = layout.time_blocks - 1 - i.astype(jnp.int32)
        group_count, _ = groups_in_block(block, layout.block_length, layout.length, GROUP)
        # Groups of the sweeps and of the adjoint steps before this block.
        swept = jnp.where(i == 0, 0, (last_groups - 1) + (i - 1) * (GROUPS - 1)).astype(jnp.int32)
        finished = jnp.where(i == 0, 0, last_groups + (i - 1) * GROUPS).astype(jnp.int32)
        plgpu.barrier_wait(smem.border_barrier)
        h = read_state(smem.border, layout.states)
        for n, state in enumerate(h):
            smem.states[0, n] = state
        plgpu.commit_smem()
        pl.when(block > 0)(lambda: fetch_border(block - 1))

        def sweep(g: Any, h: State) -> State:
            k = swept + g.astype(jnp.int32)
            slot = lax.rem(k, jnp.int32(depth))
            plgpu.barrier_wait(smem.sweep_barriers.at[slot])

            def row(r: Any, h: State) -> State:
                return next_state(smem.sweep_ring, slot, r, h, exponents)[0]

            h = fold_rows(GROUP, row, h, reverse=False, unroll=not layout.interpret)
            for n, state in enumerate(h):
                smem.states[g + 1, n] = state
            plgpu.commit_smem()
            pl.when(k + depth < sweep_groups)(lambda: fetch_sweep_group(k + depth))
            return h

        lax.fori_loop(0, group_count - 1, sweep, h)

        def group(j: Any, carry: Any) -> Any:
            g, k = group_count - 1 - j.astype(jnp.int32), finished + j.astype(jnp.int32)
            start = block * layout.block_length + g * GROUP
            slot, output_slot = (lax.rem(k, jnp.int32(n)) for n in (depth, tma.OUTPUT_SLOTS))
            plgpu.barrier_wait(smem.timed_barriers.at[slot])
            plgpu.wait_smem_to_gmem(tma.OUTPUT_SLOTS - 1, wait_read_only=True)
            valid_rows = layout.length - start
            carry = _adjoint_group(
                layout, smem, slot, output_slot, g, valid_rows, exponents, skip, carry
            )
            plgpu.commit_smem()
            for name, ref in smem.tiles.items():
                target = gmem.outputs[name]
                tma.store_tile(
                    ref.at[output_slot], target, (sequence,), start, layout.length, column
                )
            padded_states = smem.ring["B"].shape[-1]
            for name, ref in smem.sums.items():
                index = pl.ds(start * padded_states, GROUP * padded_states)
                target = gmem.outputs[name].at[sequence, column, index]
                sums = ref.at[output_slot, pl.ds(0, GROUP * padded_states)]
                plgpu.copy_smem_to_gmem(sums, target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            pl.when(k + depth < total_groups)(lambda: fetch_group(k + depth))
            return carry

        return lax.fori_loop(0, group_count, group, carry)

    zero = tma.zero_row(state_dtype)
    carry = (d_final, (zero,) * layout.states, zero)
    dh0, dA, dD = lax.fori_loop(0, layout.time_blocks, block_of_time, carry)
    for n in range(layout.states):
        smem.states[0, n], smem.states[1, n] = dA[n], dh0[n]
    smem.D[...] = dD
    plgpu.commit_smem()
    for i, name in enumerate(("dA", "dh0")):
        tile, target = smem.states.at[i], gmem.outputs[name]
        tma.store_tile(tile, target, (sequence,), 0, layout.states, column)
    tma.store_row(smem.D, gmem.outputs["dD"], (sequence,), column, layout.column_blocks)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def _adjoint_group(
    layout: BlockLayout,
    smem: SharedMemory,
    slot: Any,
    output_slot: Any,
    g: Any,
    valid_rows: Any,
    exponents: State,
    skip: jax.Array,
    carry: Any,
) -> Any:
    """Run the adjoint steps of a group on the cotangents (of the state, of A, of D)."""
    ring, padded_states = smem.ring, smem.ring["B"].shape[-1]
    h, state_dtype = read_state(smem.states.at[g], layout.states), skip.dtype

    def transpose(r: int, n: int, product: jax.Array) -> None:
        smem.transposed[r * padded_states + n, pl.ds(0, BLOCK_FEATURES)] = product

    previous: list[State] = []  # the state before each step
    for r in range(GROUP):
        previous.append(h)
        after, _ = next_state(ring, slot, r, h, exponents)
        dy = ring["dy"][slot, r].astype(state_dtype)
        for n, state in enumerate(after):
            transpose(r, n, state * dy)
        h = after
    smem.sums["dC"][output_slot] = _sum_rows(smem.transposed)

    for r in range(GROUP)[::-1]:
        d_state, dA, dD = carry
        x, dt, dy = (ring[k][slot, r].astype(state_dtype) for k in ("x", "dt", "dy"))
        reset, write = reset_at(ring, slot, r), dt * x
        d_write, ddt = jnp.zeros_like(x), jnp.zeros_like(x)
        d_previous, dA_after = [], []
        for n, old in enumerate(d_state):
            total = old + ring["C"][slot, r, n] * dy
            transpose(r, n, total * write)
            d_write = d_write + ring["B"][slot, r, n] * total
            decayed = jnp.exp2(dt * exponents[n]) * total
            change = decayed * previous[r][n]
            if reset is not None:
                decayed, change = (
                    jnp.where(reset, jnp.zeros_like(v), v) for v in (decayed, change)
                )
            ddt = ddt + change * exponents[n]
            dA_after.append(dA[n] + change * dt)
            d_previous.append(decayed)
        ddt = ddt * math.log(2) + d_write * x
        dx = d_write * dt + skip * dy
        for name, value in {"dx": dx, "ddt": ddt}.items():
            smem.tiles[name][output_slot, r] = value.astype(smem.tiles[name].dtype)
        new = (*d_previous, *dA_after, dD + dy * x)
        flat = if_valid(layout, r < valid_rows, new, (*d_state, *dA, dD))
        carry = flat[: layout.states], flat[layout.states : -1], flat[-1]
    smem.sums["dB"][output_slot] = _sum_rows(smem.transposed)
    return carry


def _sum_rows(transposed: Any) -> jax.Array:
    """Sum the rows that all threads have written, each row in one thread."""
    plgpu.commit_smem()
    layout = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)  # a row for each thread
    parts = [
        gpu_load(transposed.at[pl.ds(0, BLOCK_FEATURES), pl.ds(first, 4)], layout)
        for first in range(0, BLOCK_FEATURES, 4)
    ]
    total = functools.reduce(jnp.add, parts)
    plgpu.commit_smem()  # before threads overwrite the rows
    return jnp.sum(total, axis=1)
