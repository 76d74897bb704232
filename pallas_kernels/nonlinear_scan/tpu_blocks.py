"""Blocks of sequences and of time in the TPU kernel of nonlinear cells, and their layout."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import pl
from pallas_kernels.nonlinear_scan.cell_trace import OP
from pallas_kernels.nonlinear_scan.row_arrays import ArrayLayout

BLOCK_BYTES = 14 * 2**20  # of all blocks of time, and of the factors for a block
MAX_SEQUENCES = 128  # in a block
MAX_STEPS = 64  # in a block


class Blocks(NamedTuple):
    """Sizes of a call.

    Attributes:
      length: T.
      batch: number of sequences B.
      channels: D.
      sequences: number of sequences in a block.
      steps: number of steps in a block.
      reverse: whether time runs backward.
      interpret: whether the kernel is interpreted.
    """

    length: int
    batch: int
    channels: int
    sequences: int
    steps: int
    reverse: bool
    interpret: bool

    @property
    def row(self) -> tuple[int, int]:
        """The shape of a row."""
        return self.sequences, self.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks of sequences, and of time."""
        return -(-self.batch // self.sequences), -(-self.length // self.steps)

    @property
    def padded(self) -> int:
        """Number of sequences in all blocks."""
        return self.grid[0] * self.sequences

    def valid_steps(self) -> Any:
        """Return the number of steps of the current block before the end of the sequence."""
        if self.length % self.steps == 0:
            return self.steps
        i = pl.program_id(1)
        block = self.grid[1] - 1 - i if self.reverse else i
        return jnp.minimum(self.steps, self.length - block * self.steps)

    def timed(self, rows: int, width: int | None = None) -> Any:
        """Return the spec of an array [T, rows, B, width]."""

        def at(b: Any, i: Any) -> tuple[Any, ...]:
            return (self.grid[1] - 1 - i if self.reverse else i, 0, b, 0)

        width = self.channels if width is None else width
        return pl.BlockSpec((self.steps, rows, self.sequences, width), at)

    def fixed(self, rows: int) -> Any:
        """Return the spec of an array [rows, B, D]."""
        return pl.BlockSpec((rows, *self.row), lambda b, i: (0, b, 0))

    def time_first(self, x: jax.Array, lead: int, zero: bool = False) -> jax.Array:
        """Convert [B, T, (R,) D] or, with `lead` 1, [B, (R,) D], to the kernel's layout.

        The batch is padded with copies of its last sequence, so that padding adds no non-finite
        values. With `zero`, for cotangents, it is padded with zeros.
        """
        x = x.reshape(*x.shape[:lead], -1, x.shape[-1])
        x = jnp.moveaxis(x, 0, -2)
        pad = [(0, 0)] * (x.ndim - 2) + [(0, self.padded - self.batch), (0, 0)]
        return jnp.pad(x, pad, mode="constant" if zero else "edge")

    def batch_first(self, x: jax.Array, layout: ArrayLayout) -> jax.Array:
        """Convert [T, R, B, D] or [R, B, D] back to the layout [B, T, (R,) D] or [B, (R,) D]."""
        x = jnp.moveaxis(x[..., : self.batch, :], -2, 0)
        return x.reshape(*x.shape[:-2], *layout.number_axis, self.channels)


def choose_blocks(
    length: int, batch: int, channels: int, rows: int, reverse: bool, interpret: bool
) -> Blocks:
    """Choose the sizes of blocks if a step has `rows` rows of float32 in VMEM.

    Raises:
      NotImplementedError: if not even a step of eight sequences fits.
    """
    count = -(-batch // MAX_SEQUENCES)
    tile = 8 if count == 1 else 16  # rows of 16-bit numbers in a tile, for more than one block
    sequences = -(-batch // (tile * count)) * tile
    lanes = -(-channels // 128) * 128

    def steps(sequences: int) -> int:
        return BLOCK_BYTES // (4 * rows * lanes * sequences)

    while sequences > 16 and steps(sequences) < 8:
        sequences = -(-sequences // 32) * 16
    if steps(sequences) == 0:
        raise NotImplementedError(
            f"{OP}: a step of the cell must fit into the memory of a TPU core, got D={channels} "
            f"with {rows} numbers per channel; use implementation='xla' or None."
        )
    return Blocks(
        length,
        batch,
        channels,
        sequences,
        min(length, MAX_STEPS, steps(sequences)),
        reverse,
        interpret,
    )
