"""Shared parts of the two passes of the selective scan on GPU: blocks, copies and one step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma
from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.jax_compat import pl
from pallas_kernels.selection import select
from pallas_kernels.selective_scan import GPU_STATES

GROUP = 8  # steps that are unrolled together
Refs = Mapping[str, Any]  # by the names of the arrays: x, dt, B, C, dy, reset
State = tuple[jax.Array, ...]


class BlockLayout(NamedTuple):
    """Division of the arrays into blocks.

    Attributes:
      length: T.
      width: D.
      states: N.
      block_length: time steps per block.
      prefetch_depth: blocks of time in shared memory, in flight or in use.
      interpret: whether the kernel is interpreted on a CPU.
    """

    length: int
    width: int
    states: int
    block_length: int
    prefetch_depth: int
    interpret: bool

    @property
    def time_blocks(self) -> int:
        """Number of blocks of time."""
        return -(-self.length // self.block_length)

    @property
    def column_blocks(self) -> int:
        """Number of blocks of features."""
        return -(-self.width // BLOCK_FEATURES)


def check(states: int, *arrays: jax.Array) -> None:
    """Check that the kernels support N and the rows of the arrays.

    Raises:
      NotImplementedError: if N is above 16, or the size of a row is not a multiple of 16 bytes.
    """
    if states > GPU_STATES:
        raise NotImplementedError(
            f"selective_scan: the GPU kernel supports at most {GPU_STATES} states per channel, got "
            f"N={states}; use implementation='xla' or None."
        )
    tma.check_alignment("selective_scan", arrays)


def timed_arrays(arrays: dict[str, jax.Array], reset: jax.Array | None) -> dict[str, jax.Array]:
    """Return the arrays with a time axis, with B, C and resets padded to multiples of 16 bytes."""
    padded = dict(arrays)
    for name in padded.keys() & {"B", "C"}:
        padded[name] = jnp.pad(arrays[name], ((0, 0), (0, 0), (0, -arrays[name].shape[-1] % 4)))
    if reset is not None:
        padded["reset"] = tma.reset_words(reset)
    return padded


def _row_shape(name: str, array: jax.Array) -> tuple[int, ...]:
    """Return the shape of one time step of an array, in a thread block."""
    return {"B": array.shape[-1:], "C": array.shape[-1:], "reset": ()}.get(name, (BLOCK_FEATURES,))


def step_bytes(timed: dict[str, jax.Array]) -> int:
    """Return the shared memory of one time step of the arrays."""
    return sum(math.prod(_row_shape(k, array)) * array.dtype.itemsize for k, array in timed.items())


def ring_buffer(timed: dict[str, jax.Array], depth: int, block_length: int) -> dict[str, Any]:
    """Return shared memory for a number of blocks of time."""

    def rows(name: str) -> int:
        return max(block_length, tma.MIN_RESETS) if name == "reset" else block_length

    return {
        name: plgpu.SMEM((depth, rows(name), *_row_shape(name, array)), array.dtype)
        for name, array in timed.items()
    }


def fetch(
    gmem: Refs, ring: Refs, slot: Any, sequence: Any, start: Any, columns: Any, barrier: Any
) -> None:
    """Start the copies of a block of time to a slot of a ring buffer."""
    for name, ref in ring.items():
        index: tuple[Any, ...] = (sequence, pl.ds(start, ref.shape[1]))
        if name not in ("B", "C", "reset"):
            index = (*index, columns)
        plgpu.copy_gmem_to_smem(gmem[name].at[index], ref.at[slot], barrier.at[slot])


def binary_exponents(A: jax.Array) -> jax.Array:
    """Return A times log2(e), because the hardware computes powers of 2."""
    return A * math.log2(math.e)


def read_state(ref: Any, states: int) -> State:
    """Read the N rows of [N, 128], of which a thread has a column."""
    return tuple(ref[n] for n in range(states))


def next_state(
    ring: Refs, slot: Any, t: Any, h: State, exponents: State
) -> tuple[State, jax.Array]:
    """Compute the state after step `t` of the block in a slot of the ring, and read its x."""
    x, dt = (ring[k][slot, t].astype(h[0].dtype) for k in ("x", "dt"))
    reset, write, after = reset_at(ring, slot, t), dt * x, []
    for n, (old, exponent) in enumerate(zip(h, exponents, strict=True)):
        decayed = jnp.exp2(dt * exponent) * old
        if reset is not None:
            decayed = jnp.where(reset, jnp.zeros_like(decayed), decayed)
        after.append(decayed + ring["B"][slot, t, n] * write)
    return tuple(after), x


def reset_at(ring: Refs, slot: Any, t: Any) -> jax.Array | None:
    """Return whether the state is cleared before step `t`; None without resets."""
    return tma.broadcast_flag(ring["reset"][slot, t] != 0) if "reset" in ring else None


def if_valid(layout: BlockLayout, valid: Any, new: State, old: State) -> State:
    """Return the new values, or the old ones for steps after the end of the sequence."""
    if layout.length % GROUP == 0:
        return new
    return select(tma.broadcast_flag(valid), new, old)
