"""Shared parts of the two passes of the selective scan on TPU: specs, the call and one step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.selection import select

Scratch = list[tuple[str, tuple[int, ...], Any]]
State = tuple[jax.Array, ...]


class Variant(NamedTuple):
    """Specialization of a kernel.

    Attributes:
      length: T.
      width: D.
      states: N.
      steps: time steps of a block.
      columns: columns of D in a block.
      group_length: rows that are widened and narrowed together.
      interpret: whether the kernel is interpreted.
    """

    length: int
    width: int
    states: int
    steps: int
    columns: int
    group_length: int
    interpret: bool

    @property
    def time_blocks(self) -> int:
        """Number of blocks of time."""
        return -(-self.length // self.steps)

    @property
    def column_blocks(self) -> int:
        """Number of blocks of features."""
        return -(-self.width // self.columns)


def block_columns(width: int, states: int, registers: int) -> int:
    """Return the columns of a block, whose N rows fit a number of registers of 1024 elements."""
    most = max(128, registers * 1024 // states // 128 * 128)
    lanes = -(-width // 128) * 128
    parts = -(-lanes // most)
    return width if parts == 1 else -(-lanes // (128 * parts)) * 128


class Specs:
    """Block specs of the arrays, over a grid (B, D, T).

    Attributes:
      timed: spec of arrays [B, T, D].
      scalars: spec of B and C [B, T, N], in SMEM.
      reset: spec of resets [B, blocks, 1, block length], in SMEM.
      exponents: spec of A [N, 1, D].
      skip: spec of D [1, D].
      state: spec of states [B, N, D].
      row: spec of rows [B, 1, D].
      borders: spec of states at borders [B, blocks, N, D].
      sums: spec of sums over columns [B, column blocks, T, N].
    """

    def __init__(self, variant: Variant, backwards: bool) -> None:
        """Create the specs, for time that runs forwards or backwards."""

        def time(t: Any) -> Any:
            return variant.time_blocks - 1 - t if backwards else t

        steps, states, columns = variant.steps, variant.states, variant.columns
        self.timed = pl.BlockSpec((None, steps, columns), lambda b, d, t: (b, time(t), d))
        self.scalars = pl.BlockSpec(
            (None, steps, states), lambda b, d, t: (b, time(t), 0), memory_space=pltpu.SMEM
        )
        self.reset = pl.BlockSpec(
            (None, None, 1, steps), lambda b, d, t: (b, time(t), 0, 0), memory_space=pltpu.SMEM
        )
        self.exponents = pl.BlockSpec((states, 1, columns), lambda b, d, t: (0, 0, d))
        self.skip = pl.BlockSpec((1, columns), lambda b, d, t: (0, d))
        self.state = pl.BlockSpec((None, states, columns), lambda b, d, t: (b, 0, d))
        self.row = pl.BlockSpec((None, 1, columns), lambda b, d, t: (b, 0, d))
        self.borders = pl.BlockSpec(
            (None, None, states, columns), lambda b, d, t: (b, time(t), 0, d)
        )
        self.sums = pl.BlockSpec((None, None, steps, states), lambda b, d, t: (b, d, time(t), 0))


def call_kernel(
    kernel: Callable[[dict[str, Any]], None],
    variant: Variant,
    inputs: list[tuple[str, jax.Array, Any]],
    outputs: list[tuple[str, tuple[int, ...], Any, Any]],
    scratch: Scratch,
    name: str,
) -> dict[str, jax.Array]:
    """Run a kernel, which gets its references by name.

    Args:
      kernel: the kernel's body.
      variant: its specialization.
      inputs: (name, array, spec) of each; x is first.
      outputs: (name, shape, dtype, spec) of each.
      scratch: (name, shape, dtype) of each, in VMEM.
      name: name of the kernel.

    Returns:
      The outputs by name.
    """
    output_names = [entry[0] for entry in outputs]
    names = [*(i[0] for i in inputs), *output_names, *(s[0] for s in scratch)]

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)))

    x = inputs[0][1]
    out = pl.pallas_call(
        body,
        grid=(x.shape[0], variant.column_blocks, variant.time_blocks),
        in_specs=[spec for _, _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[array_like(x, shape, dtype) for _, shape, dtype, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for _, shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=variant.interpret,
        name=name,
    )(*(array for _, array, _ in inputs))
    return dict(zip(output_names, out, strict=True))


def wide_rows(variant: Variant, state_dtype: Any, dtypes: dict[str, Any]) -> Scratch:
    """Return scratch to widen and narrow the arrays that have another dtype than the state."""
    shape = (variant.group_length, variant.columns)
    return [
        (f"wide_{k}", shape, state_dtype) for k, dtype in dtypes.items() if dtype != state_dtype
    ]


def binary_exponents(A: jax.Array) -> jax.Array:
    """Return A times log2(e) as [N, 1, D], because the hardware computes powers of 2.

    The rows of [N, 1, D] are contiguous in memory.
    """
    return (A * math.log2(math.e))[:, None]


def next_state(
    exponents: Any, B: Any, reset: Any, h: State, x: jax.Array, dt: jax.Array, t: Any
) -> State:
    """Compute the state after step `t` of a block; `reset` is None without resets."""
    clear = None if reset is None else reset[0, t] != 0
    write, after = dt * x, []
    for n, old in enumerate(h):
        decayed = jnp.exp2(dt * exponents[n]) * old
        if clear is not None:
            decayed = jnp.where(clear, jnp.zeros_like(decayed), decayed)
        after.append(decayed + B[t, n] * write)
    return tuple(after)


def read_state(ref: Any, states: int) -> State:
    """Read the N rows [1, columns] of a state [N, columns]."""
    return tuple(ref[n : n + 1, :] for n in range(states))


def if_valid(variant: Variant, valid: Any, new: State, old: State) -> State:
    """Return the new values, or the old ones for rows after the end of the sequence."""
    return new if variant.length % variant.group_length == 0 else select(valid, new, old)
