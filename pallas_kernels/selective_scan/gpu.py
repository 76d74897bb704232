"""Mamba's selective scan on GPU: states stay in registers, inputs and outputs pass once.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t        h [N, D]
    y_t = sum_n C_t[n] h_t[n] + D x_t

A thread block has 128 features of one sequence, one for each of its threads, and takes them
through all of time; a thread has the N states of its feature. B_t[n] and C_t[n] are the same for
all threads of a block. Arrays come to shared memory by the copy engine (TMA), several blocks of
time ahead. States reach main memory at the borders of blocks of 64 steps only, for the backward
pass, which is in `_gpu_backward`. For Hopper and newer, by Mosaic GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma as gpu
from pallas_kernels.jax_compat import array_like, pl
from pallas_kernels.selective_scan import ROWS, border_shape
from pallas_kernels.selective_scan.gpu_backward import backward
from pallas_kernels.selective_scan.gpu_step import (
    GROUP,
    Plan,
    Refs,
    State,
    bytes_of_step,
    check,
    fetch,
    in_rows,
    in_time,
    inside,
    named,
    ring,
    rows_of,
    step,
)
from pallas_kernels.vmem_rows import each, groups

__all__ = ["backward", "forward"]


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
    save: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final state, and the states before each block of 64 steps if they are to be saved.

    Arguments and results are those of the kernel for TPU; `interpret` runs it without a GPU.

    Raises:
      NotImplementedError: for rows of no multiple of 16 bytes, or N above 16.
    """
    wide, (batch, length, width), states = h0.dtype, x.shape, A.shape[0]
    check(states, x, dt, h0)
    timed = in_time({"x": x, "dt": dt, "B": B, "C": C}, reset)
    fixed = {"A": in_rows(A), "D": D[0], "h0": h0}
    outputs = {"y": array_like(x, x.shape, x.dtype), "final": array_like(x, h0.shape, wide)}
    if save:
        shape = border_shape((batch, length, width, states))
        outputs["borders"] = array_like(x, shape, wide)

    fetched, made = bytes_of_step(timed), gpu.WIDTH * x.dtype.itemsize
    rows = gpu.steps(length, fetched, made)
    rows = min(32, max(GROUP, rows))  # so that a border has gone when the next one comes
    left = gpu.HALF - 2 * (states + 1) * gpu.WIDTH * wide.itemsize - gpu.BEHIND * rows * made
    ahead = min(gpu.AHEAD, -(-length // rows), left // (rows * fetched))
    plan = Plan(length, width, states, rows, ahead, interpret)
    scratch: dict[str, Any] = {
        "ring": ring(timed, ahead, rows),
        "A": plgpu.SMEM((states, gpu.WIDTH), wide),
        "D": plgpu.SMEM((gpu.WIDTH,), wide),
        "state": plgpu.SMEM((states, gpu.WIDTH), wide),
        "y": plgpu.SMEM((gpu.BEHIND, rows, gpu.WIDTH), x.dtype),
        "ready": plgpu.Barrier(num_arrivals=len(timed), num_barriers=ahead),
        "first": plgpu.Barrier(num_arrivals=len(fixed)),
    }
    names = [*timed, *fixed, *outputs]
    out = gpu.launch(
        functools.partial(named(_forward), plan, names),
        (*timed.values(), *fixed.values()),
        list(outputs.values()),
        scratch,
        batch * plan.across,
        name="selective_scan",
        interpret=interpret,
        approximate=True,  # 2 units in the last place, and no subnormal numbers
    )
    return out[0], out[1], out[2] if save else None


def _forward(plan: Plan, far: Refs, at: dict[str, Any]) -> None:
    sequence, column = gpu.position(plan.across)
    columns = pl.ds(column * gpu.WIDTH, gpu.WIDTH)
    near, apart = at["ring"], ROWS // plan.rows

    def bring(block: Any) -> None:
        slot = lax.rem(block, jnp.int32(plan.ahead))
        fetch(far, near, slot, sequence, block * plan.rows, columns, at["ready"])

    def send_state(to: Any, leading: tuple[Any, ...]) -> None:
        gpu.send(at["state"], to, leading, 0, plan.states, column)

    lax.fori_loop(0, plan.ahead, lambda i, _: bring(i.astype(jnp.int32)), None)
    plgpu.copy_gmem_to_smem(far["A"].at[:, columns], at["A"], at["first"])
    plgpu.copy_gmem_to_smem(far["D"].at[columns], at["D"], at["first"])
    plgpu.copy_gmem_to_smem(far["h0"].at[sequence, :, columns], at["state"], at["first"])
    plgpu.barrier_wait(at["first"])
    weight, skip = rows_of(at["A"], plan.states), at["D"][...]

    def block_of_time(i: Any, h: State) -> State:
        block = i.astype(jnp.int32)
        slot, place = (lax.rem(block, jnp.int32(n)) for n in (plan.ahead, gpu.BEHIND))
        plgpu.barrier_wait(at["ready"].at[slot])
        plgpu.wait_smem_to_gmem(gpu.BEHIND - 1, wait_read_only=True)
        count, valid = groups(block, plan.rows, plan.length, GROUP)

        def group(g: Any, h: State) -> State:
            def row(r: Any, h: State) -> State:
                t = g * GROUP + r
                after, x = step(near, slot, t, h, weight)
                y = skip * x
                for n, state in enumerate(after):
                    y = y + near["C"][slot, t, n] * state
                at["y"][place, t] = y.astype(at["y"].dtype)
                return inside(plan, t < valid, after, h)

            return each(GROUP, row, h, reverse=False, unroll=not plan.interpret)

        if "borders" in far:

            @pl.when(lax.rem(block, jnp.int32(apart)) == 0)
            def _border() -> None:
                for n, state in enumerate(h):
                    at["state"][n] = state
                plgpu.commit_smem()
                send_state(far["borders"], (sequence, lax.div(block, jnp.int32(apart))))

        h = lax.fori_loop(0, count, group, h)
        plgpu.commit_smem()
        gpu.send(at["y"].at[place], far["y"], (sequence,), block * plan.rows, plan.length, column)
        plgpu.commit_smem_to_gmem_group()
        pl.when(block + plan.ahead < plan.blocks)(lambda: bring(block + plan.ahead))
        return h

    h = lax.fori_loop(0, plan.blocks, block_of_time, rows_of(at["state"], plan.states))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for n, state in enumerate(h):
        at["state"][n] = state
    plgpu.commit_smem()
    send_state(far["final"], (sequence,))
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
