"""Layout of arrays and sizes of blocks in the GPU kernel of cells with matrices.

An array [B, T, R, D] becomes [groups, tiles, T, R, 64, sequences]: a group is the sequences of a
thread block, and a tile the 64 channels of a warpgroup. What a warpgroup copies at a step is
contiguous. Sequences and channels are padded with zeros.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.limits import MULTIPROCESSORS
from pallas_kernels.gpu.tma import MAX_PREFETCH_DEPTH, MIN_RESETS, SMEM_WHOLE
from pallas_kernels.nonlinear_scan.cell_trace import OP

TILE = 64  # channels of a warpgroup: the rows of a tensor core's product
SEQUENCES = (8, 16, 32)  # in a thread block

# Pieces of a float32 number, for each precision of a product. TF32, which XLA may use by default,
# has 11 significant bits, one piece has 8, and two have 16.
_PIECES = {
    "DEFAULT": 2,
    "HIGH": 2,
    "HIGHEST": 3,
    "BF16_BF16_F32": 1,
    "BF16_BF16_F32_X3": 2,
    "BF16_BF16_F32_X6": 3,
    "BF16_BF16_F32_X9": 3,
    "TF32_TF32_F32": 2,
    "TF32_TF32_F32_X3": 3,
    "F32_F32_F32": 3,
}


class DenseLayout(NamedTuple):
    """Sizes of a call.

    Attributes:
      length: T.
      batch: number of sequences B.
      channels: D.
      sequences: number of sequences in a thread block.
      depth: number of steps in shared memory, in flight or in use.
      pieces: bfloat16 numbers that stand for a float32 number in products.
      reverse: whether time runs backward.
      interpret: whether the kernel is interpreted on a CPU.
    """

    length: int
    batch: int
    channels: int
    sequences: int
    depth: int
    pieces: int
    reverse: bool
    interpret: bool

    @property
    def tiles(self) -> int:
        """Number of warpgroups of a thread block."""
        return -(-self.channels // TILE)

    @property
    def groups(self) -> int:
        """Number of thread blocks."""
        return -(-self.batch // self.sequences)

    @property
    def row(self) -> tuple[int, int]:
        """Shape of the part of a row that a warpgroup has."""
        return TILE, self.sequences

    def shape(self, length: int, rows: int) -> tuple[int, ...]:
        """Return the shape of an array in the kernel."""
        return self.groups, self.tiles, length, rows, *self.row

    def blocks(self, x: jax.Array) -> jax.Array:
        """Convert [B, T, (R,) D] to the layout of the kernel."""
        x = x.reshape(*x.shape[:2], -1, self.channels)
        x = self._padded(x, (self.groups * self.sequences, *x.shape[1:3], self.tiles * TILE))
        x = x.reshape(self.groups, self.sequences, *x.shape[1:3], self.tiles, TILE)
        return x.transpose(0, 4, 2, 3, 5, 1)

    def rows(self, x: jax.Array) -> jax.Array:
        """Convert an array of the kernel to [B, T, R, D]."""
        x = x.transpose(0, 5, 2, 3, 1, 4)
        x = x.reshape(self.groups * self.sequences, *x.shape[2:4], self.tiles * TILE)
        return x[: self.batch, ..., : self.channels]

    def matrix(self, x: jax.Array) -> list[jax.Array]:
        """Return the pieces of a matrix [D, D], [tiles, tiles, 64, 64]."""
        x = self._padded(x.astype(jnp.float32), (self.tiles * TILE,) * 2)
        x = x.reshape(self.tiles, TILE, self.tiles, TILE).transpose(0, 2, 1, 3)
        return mp.split(x, self.pieces)

    def vectors(self, x: jax.Array) -> jax.Array:
        """Convert [1, (R,) D] to [R, tiles, 64]."""
        x = x.reshape(-1, self.channels)
        return self._padded(x, (x.shape[0], self.tiles * TILE)).reshape(-1, self.tiles, TILE)

    def resets(self, reset: jax.Array) -> jax.Array:
        """Convert [B, T] bool to int32 [groups, T, sequences], with a padded last axis."""
        size = (self.groups * self.sequences, self.length)
        x = self._padded(reset.astype(jnp.int32), size)
        x = x.reshape(self.groups, self.sequences, self.length).transpose(0, 2, 1)
        return self._padded(x, (*x.shape[:2], max(self.sequences, MIN_RESETS)))

    @staticmethod
    def _padded(x: jax.Array, shape: Sequence[int]) -> jax.Array:
        return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


def count_pieces(precisions: Iterable[Any], narrow: bool) -> int:
    """Return the number of pieces that products of these precisions need.

    `narrow` says that the inputs of the call are bfloat16. Products then have one piece, if they
    have the default precision.
    """
    found = [1]
    for precision in precisions:
        for one in precision if isinstance(precision, tuple) else (precision,):
            name = "DEFAULT" if one is None else getattr(one, "name", str(one))
            if name not in _PIECES:
                raise NotImplementedError(
                    f"{OP}: products in the GPU kernel must have a precision of"
                    f" {', '.join(_PIECES)}, got {name}; use implementation='xla' or None."
                )
            found.append(1 if narrow and name == "DEFAULT" else _PIECES[name])
    return max(found)


def dense_layout(
    timed: Mapping[str, Sequence[jax.Array]],
    matrices: int,
    slots: int,
    pieces: int,
    *,
    resets: bool,
    reverse: bool,
    interpret: bool,
) -> DenseLayout:
    """Choose the sizes of blocks.

    Args:
      timed: inputs [B, T, (R,) D] of the kernel, by name.
      matrices: number of matrices.
      slots: number of rows that matrices are multiplied with.
      pieces: see `count_pieces`.
      resets: whether there are resets.
      reverse: whether time runs backward.
      interpret: run in interpret mode.

    Raises:
      NotImplementedError: if the kernel does not fit into shared memory.
    """
    arrays = [x for xs in timed.values() for x in xs]
    batch, length, *_, channels = arrays[0].shape
    numbers = sum(math.prod(x.shape[2:-1]) * x.dtype.itemsize for x in arrays)
    tiles = -(-channels // TILE)
    fixed = matrices * pieces * 2 * (tiles * TILE) ** 2

    def room(sequences: int) -> tuple[int, int]:
        """Return the bytes without timed inputs, and those of a step of timed inputs."""
        width = tiles * TILE * sequences
        per_step = numbers * width + resets * 4 * tiles * max(sequences, MIN_RESETS)
        return fixed + 2 * slots * pieces * 2 * width, per_step

    def depth(sequences: int) -> int:
        used, per_step = room(sequences)
        return min(MAX_PREFETCH_DEPTH, length, (SMEM_WHOLE - used) // per_step)

    wanted = [n for n in SEQUENCES if batch <= n * MULTIPROCESSORS] or [SEQUENCES[-1]]
    fitting = [n for n in SEQUENCES if depth(n) >= min(2, length)]
    if not fitting:
        used, per_step = room(SEQUENCES[0])
        raise NotImplementedError(
            f"{OP}: the matrices, and two steps of {SEQUENCES[0]} sequences, must take at most"
            f" {SMEM_WHOLE >> 10} KiB of a GPU's shared memory, got"
            f" {(used + 2 * per_step) / 2**10:.0f} KiB for {matrices} matrices of D={channels} with"
            f" {2 * pieces} bytes per number; use fewer channels per head, bfloat16 inputs,"
            " implementation='xla' or None."
        )
    sequences = min(wanted[0], fitting[-1])
    return DenseLayout(
        length, batch, channels, sequences, depth(sequences), pieces, reverse, interpret
    )
