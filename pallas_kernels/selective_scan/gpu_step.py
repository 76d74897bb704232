"""What the two passes of the selective scan on GPU have in common: their blocks, and a step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma as gpu
from pallas_kernels.jax_compat import pl
from pallas_kernels.selective_scan import GPU_STATES

GROUP = 8  # steps that are unrolled together
Refs = Mapping[str, Any]
State = tuple[jax.Array, ...]


class Plan(NamedTuple):
    """What a kernel is specialised to.

    Attributes:
      length: T.
      width: D.
      states: N.
      rows: of time in a block.
      ahead: blocks of time on their way to shared memory, or in use there.
      interpret: whether it runs without a GPU.
    """

    length: int
    width: int
    states: int
    rows: int
    ahead: int
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.length // self.rows)

    @property
    def across(self) -> int:
        """Blocks of features."""
        return -(-self.width // gpu.WIDTH)


def check(states: int, *arrays: jax.Array) -> None:
    """Refuse what the kernels cannot do.

    Raises:
      NotImplementedError: for it.
    """
    if states > GPU_STATES:
        raise NotImplementedError(
            f"selective_scan: the GPU kernel holds {GPU_STATES} states per channel at most, not "
            f"N={states}; use implementation='xla' or None."
        )
    gpu.check_alignment("selective_scan", arrays)


def named(body: Any) -> Any:
    """A kernel of (plan, arrays by name, scratch by name)."""

    def kernel(plan: Plan, names: Sequence[str], *refs: Any, **scratch: Any) -> None:
        body(plan, dict(zip(names, refs, strict=True)), scratch)

    return kernel


def in_time(arrays: dict[str, jax.Array], reset: jax.Array | None) -> dict[str, jax.Array]:
    """What a block of time is made of: rows of B and C in whole 16 bytes, and the resets."""
    made = dict(arrays)
    for name in made.keys() & {"B", "C"}:
        made[name] = jnp.pad(arrays[name], ((0, 0), (0, 0), (0, -arrays[name].shape[-1] % 4)))
    if reset is not None:
        made["reset"] = gpu.marks(reset)
    return made


def _across(name: str, array: jax.Array) -> tuple[int, ...]:
    """Numbers of a step of it, in a thread block."""
    return {"B": array.shape[-1:], "C": array.shape[-1:], "reset": ()}.get(name, (gpu.WIDTH,))


def bytes_of_step(timed: dict[str, jax.Array]) -> int:
    """Of shared memory."""
    return sum(math.prod(_across(k, array)) * array.dtype.itemsize for k, array in timed.items())


def ring(timed: dict[str, jax.Array], ahead: int, rows: int) -> dict[str, Any]:
    """Room in shared memory for so many blocks of time."""
    return {
        name: plgpu.SMEM(
            (ahead, max(rows, gpu.MARKS) if name == "reset" else rows, *_across(name, array)),
            array.dtype,
        )
        for name, array in timed.items()
    }


def fetch(
    far: Refs, near: Refs, slot: Any, sequence: Any, start: Any, columns: Any, at: Any
) -> None:
    """Have a block of time brought to its place in a ring."""
    for name, ref in near.items():
        where: tuple[Any, ...] = (sequence, pl.ds(start, ref.shape[1]))
        if name not in ("B", "C", "reset"):
            where = (*where, columns)
        plgpu.copy_gmem_to_smem(far[name].at[where], ref.at[slot], at.at[slot])


def in_rows(A: jax.Array) -> jax.Array:
    """Times log2(e): the unit computes powers of 2."""
    return A * math.log2(math.e)


def rows_of(ref: Any, states: int) -> State:
    """The rows of [N, 128], of which a thread has a column."""
    return tuple(ref[n] for n in range(states))


def step(near: Refs, slot: Any, t: Any, h: State, weight: State) -> tuple[State, jax.Array]:
    """The state after a step that lies at `t` in a slot of the ring, and its x."""
    x, dt = (near[k][slot, t].astype(h[0].dtype) for k in ("x", "dt"))
    cut, write, after = cut_at(near, slot, t), dt * x, []
    for n, (old, power) in enumerate(zip(h, weight, strict=True)):
        kept = jnp.exp2(dt * power) * old
        if cut is not None:
            kept = jnp.where(cut, jnp.zeros_like(kept), kept)
        after.append(kept + near["B"][slot, t, n] * write)
    return tuple(after), x


def cut_at(near: Refs, slot: Any, t: Any) -> jax.Array | None:
    """Whether the state is cleared there; None if it never is."""
    return gpu.everywhere(near["reset"][slot, t] != 0) if "reset" in near else None


def inside(plan: Plan, valid: Any, new: State, old: State) -> State:
    """The new values, but for steps after the end of the sequence."""
    if plan.length % GROUP == 0:
        return new
    flag = gpu.everywhere(valid)
    return tuple(jnp.where(flag, p, q) for p, q in zip(new, old, strict=True))
