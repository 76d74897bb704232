"""The backward pass of the selective scan on GPU, from the states at the borders of its blocks.

It takes blocks of 64 steps against time. It runs through one from the state at its border and
leaves the states before each group of 8 steps in shared memory; then it takes the groups from the
last to the first, makes the states of one again, in registers, and goes back through them. What
is summed over D, for the cotangents of B and C, is written to shared memory turned around: a row
for each step and n, which one thread adds up. The sums of thread blocks are added outside.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma as gpu
from pallas_kernels.jax_compat import array_like, gpu_load, pl
from pallas_kernels.selective_scan import ROWS
from pallas_kernels.selective_scan.gpu_step import (
    GROUP,
    Plan,
    Refs,
    State,
    bytes_of_step,
    check,
    cut_at,
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

APART = ROWS // GROUP  # groups between borders
PITCH = gpu.WIDTH + 4  # of rows that are added up: 8 threads then read 16 bytes each from 32 banks


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
    """The cotangents of (x, dt, A, B, C, D, h0), those of A to D in the dtype of the state."""
    wide, (batch, length, width), states = borders.dtype, x.shape, A.shape[0]
    check(states, x, dt, dy, borders)
    again = in_time({"x": x, "dt": dt, "B": B}, reset)
    timed = in_time({"x": x, "dt": dt, "B": B, "C": C, "dy": dy}, reset)
    fixed = {"A": in_rows(A), "D": D[0], "d_final": d_final, "borders": borders}
    room = timed["B"].shape[-1]  # of the sums of a step
    total = -(-length // GROUP)
    across = -(-width // gpu.WIDTH)
    sums = (batch, across, total * GROUP * room)
    shapes = {"dx": (x.shape, x.dtype), "ddt": (dt.shape, dt.dtype)}
    shapes |= {"dB": (sums, wide), "dC": (sums, wide), "dA": (d_final.shape, wide)}
    shapes |= {"dh0": (d_final.shape, wide), "dD": ((batch, width), wide)}
    outputs = {name: array_like(x, *like) for name, like in shapes.items()}

    scratch: dict[str, Any] = {
        "held": plgpu.SMEM((APART, states, gpu.WIDTH), wide),
        "border": plgpu.SMEM((states, gpu.WIDTH), wide),
        "D": plgpu.SMEM((gpu.WIDTH,), wide),
        "turned": plgpu.SMEM((gpu.WIDTH, PITCH), wide),
        "sums": {k: plgpu.SMEM((gpu.BEHIND, gpu.WIDTH), wide) for k in ("dB", "dC")},
        "made": {
            k: plgpu.SMEM((gpu.BEHIND, GROUP, gpu.WIDTH), shapes[k][1]) for k in ("dx", "ddt")
        },
    }
    held = (APART + 1) * states + PITCH + gpu.BEHIND * 2  # rows of 128 numbers
    made = gpu.BEHIND * GROUP * gpu.WIDTH * (x.dtype.itemsize + dt.dtype.itemsize)
    left = gpu.WHOLE - held * gpu.WIDTH * wide.itemsize - made
    of_group = GROUP * (bytes_of_step(again) + bytes_of_step(timed))
    ahead = min(gpu.AHEAD, total, left // of_group)
    scratch["again"], scratch["ring"] = ring(again, ahead, GROUP), ring(timed, ahead, GROUP)
    scratch["ready_again"] = plgpu.Barrier(num_arrivals=len(again), num_barriers=ahead)
    scratch["ready"] = plgpu.Barrier(num_arrivals=len(timed), num_barriers=ahead)
    scratch["first"] = plgpu.Barrier(num_arrivals=3)
    scratch["at_border"] = plgpu.Barrier(num_arrivals=1)
    plan = Plan(length, width, states, ROWS, ahead, interpret)
    out = gpu.launch(
        functools.partial(named(_backward), plan, [*timed, *fixed, *outputs]),
        (*timed.values(), *fixed.values()),
        list(outputs.values()),
        scratch,
        batch * across,
        name="selective_scan_backward",
        interpret=interpret,
        approximate=True,
    )
    found = dict(zip(outputs, out, strict=True))
    dB, dC = (
        found[k].reshape(batch, across, -1, room).sum(1)[:, :length, :states] for k in ("dB", "dC")
    )
    dD = found["dD"].sum(0, keepdims=True)
    return found["dx"], found["ddt"], found["dA"].sum(0), dB, dC, dD, found["dh0"]


def _backward(plan: Plan, far: Refs, at: dict[str, Any]) -> None:
    sequence, column = gpu.position(plan.across)
    columns, held = pl.ds(column * gpu.WIDTH, gpu.WIDTH), at["held"]
    wide, total = held.dtype, -(-plan.length // GROUP)
    last = total - (plan.blocks - 1) * APART  # groups of the last block
    sweeps = (last - 1) + (plan.blocks - 1) * (APART - 1)  # all groups, but for the last of a block

    def bring(k: Any) -> None:
        """Have the k-th group from the end brought."""
        slot, start = lax.rem(k, jnp.int32(plan.ahead)), (total - 1 - k) * GROUP
        fetch(far, at["ring"], slot, sequence, start, columns, at["ready"])

    def bring_again(k: Any) -> None:
        """Likewise the k-th of those that are run through first."""
        later = k - (last - 1)
        before = lax.div(later, jnp.int32(APART - 1))
        block = plan.blocks - 2 - before
        group = block * APART + lax.rem(later, jnp.int32(APART - 1))
        group = jnp.where(later < 0, (plan.blocks - 1) * APART + k, group)
        slot = lax.rem(k, jnp.int32(plan.ahead))
        fetch(far, at["again"], slot, sequence, group * GROUP, columns, at["ready_again"])

    def bring_border(block: Any) -> None:
        where = far["borders"].at[sequence, block, :, columns]
        plgpu.copy_gmem_to_smem(where, at["border"], at["at_border"])

    lax.fori_loop(0, min(plan.ahead, total), lambda i, _: bring(i.astype(jnp.int32)), None)
    lax.fori_loop(0, min(plan.ahead, sweeps), lambda i, _: bring_again(i.astype(jnp.int32)), None)
    bring_border(plan.blocks - 1)
    # These pass through shared memory, where other things lie later.
    plgpu.copy_gmem_to_smem(far["A"].at[:, columns], held.at[0], at["first"])
    plgpu.copy_gmem_to_smem(far["d_final"].at[sequence, :, columns], held.at[1], at["first"])
    plgpu.copy_gmem_to_smem(far["D"].at[columns], at["D"], at["first"])
    plgpu.barrier_wait(at["first"])
    weight, after = (rows_of(held.at[i], plan.states) for i in (0, 1))
    skip = at["D"][...]

    def block_of_time(i: Any, carry: Any) -> Any:
        block = plan.blocks - 1 - i.astype(jnp.int32)
        count, _ = groups(block, plan.rows, plan.length, GROUP)
        swept = jnp.where(i == 0, 0, (last - 1) + (i - 1) * (APART - 1)).astype(jnp.int32)
        taken = jnp.where(i == 0, 0, last + (i - 1) * APART).astype(jnp.int32)
        plgpu.barrier_wait(at["at_border"])
        h = rows_of(at["border"], plan.states)
        for n, state in enumerate(h):
            held[0, n] = state
        plgpu.commit_smem()
        pl.when(block > 0)(lambda: bring_border(block - 1))

        def sweep(g: Any, h: State) -> State:
            k = swept + g.astype(jnp.int32)
            slot = lax.rem(k, jnp.int32(plan.ahead))
            plgpu.barrier_wait(at["ready_again"].at[slot])

            def row(r: Any, h: State) -> State:
                return step(at["again"], slot, r, h, weight)[0]

            h = each(GROUP, row, h, reverse=False, unroll=not plan.interpret)
            for n, state in enumerate(h):
                held[g + 1, n] = state
            plgpu.commit_smem()
            pl.when(k + plan.ahead < sweeps)(lambda: bring_again(k + plan.ahead))
            return h

        lax.fori_loop(0, count - 1, sweep, h)

        def group(j: Any, carry: Any) -> Any:
            g, k = count - 1 - j.astype(jnp.int32), taken + j.astype(jnp.int32)
            start = block * plan.rows + g * GROUP
            slot, place = (lax.rem(k, jnp.int32(n)) for n in (plan.ahead, gpu.BEHIND))
            plgpu.barrier_wait(at["ready"].at[slot])
            plgpu.wait_smem_to_gmem(gpu.BEHIND - 1, wait_read_only=True)
            carry = _group(plan, at, slot, place, g, plan.length - start, weight, skip, carry)
            plgpu.commit_smem()
            for name, ref in at["made"].items():
                gpu.send(ref.at[place], far[name], (sequence,), start, plan.length, column)
            room = at["ring"]["B"].shape[-1]
            for name, ref in at["sums"].items():
                to = far[name].at[sequence, column, pl.ds(start * room, GROUP * room)]
                near = ref.at[place, pl.ds(0, GROUP * room)]
                plgpu.copy_smem_to_gmem(near, to, commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            pl.when(k + plan.ahead < total)(lambda: bring(k + plan.ahead))
            return carry

        return lax.fori_loop(0, count, group, carry)

    nothing = gpu.zeros(wide)
    carry = (after, (nothing,) * plan.states, nothing)
    dh0, dA, dD = lax.fori_loop(0, plan.blocks, block_of_time, carry)
    for n in range(plan.states):
        held[0, n], held[1, n] = dA[n], dh0[n]
    at["D"][...] = dD
    plgpu.commit_smem()
    for i, name in enumerate(("dA", "dh0")):
        gpu.send(held.at[i], far[name], (sequence,), 0, plan.states, column)
    gpu.send_row(at["D"], far["dD"], (sequence,), column, plan.across)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def _group(
    plan: Plan,
    at: dict[str, Any],
    slot: Any,
    place: Any,
    g: Any,
    valid: Any,
    weight: State,
    skip: jax.Array,
    carry: Any,
) -> Any:
    """Take the cotangents (of the state, of A, of D) back through a group, and fill `place`."""
    near, room = at["ring"], at["ring"]["B"].shape[-1]
    h, wide = rows_of(at["held"].at[g], plan.states), skip.dtype

    def put(r: int, n: int, product: jax.Array) -> None:
        at["turned"][r * room + n, pl.ds(0, gpu.WIDTH)] = product

    found: list[State] = []  # by each step
    for r in range(GROUP):
        found.append(h)
        made, _ = step(near, slot, r, h, weight)
        dy = near["dy"][slot, r].astype(wide)
        for n, state in enumerate(made):
            put(r, n, state * dy)
        h = made
    at["sums"]["dC"][place] = _added_up(at["turned"])

    for r in range(GROUP)[::-1]:
        lam, dA, dD = carry
        x, dt, dy = (near[k][slot, r].astype(wide) for k in ("x", "dt", "dy"))
        cut, write = cut_at(near, slot, r), dt * x
        d_write, ddt = jnp.zeros_like(x), jnp.zeros_like(x)
        before, dA_after = [], []
        for n, old in enumerate(lam):
            total = old + near["C"][slot, r, n] * dy
            put(r, n, total * write)
            d_write = d_write + near["B"][slot, r, n] * total
            left = jnp.exp2(dt * weight[n]) * total
            change = left * found[r][n]
            if cut is not None:
                left, change = (jnp.where(cut, jnp.zeros_like(v), v) for v in (left, change))
            ddt = ddt + change * weight[n]
            dA_after.append(dA[n] + change * dt)
            before.append(left)
        ddt = ddt * math.log(2) + d_write * x
        dx = d_write * dt + skip * dy
        for name, value in {"dx": dx, "ddt": ddt}.items():
            at["made"][name][place, r] = value.astype(at["made"][name].dtype)
        new = (*before, *dA_after, dD + dy * x)
        kept = inside(plan, r < valid, new, (*lam, *dA, dD))
        carry = kept[: plan.states], kept[plan.states : -1], kept[-1]
    at["sums"]["dB"][place] = _added_up(at["turned"])
    return carry


def _added_up(turned: Any) -> jax.Array:
    """The sums of rows that all threads have written, each by one thread."""
    plgpu.commit_smem()
    layout = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)  # a row to a thread
    parts = [
        gpu_load(turned.at[pl.ds(0, gpu.WIDTH), pl.ds(first, 4)], layout)
        for first in range(0, gpu.WIDTH, 4)
    ]
    total = functools.reduce(jnp.add, parts)
    plgpu.commit_smem()  # before they are written anew
    return jnp.sum(total, axis=1)
