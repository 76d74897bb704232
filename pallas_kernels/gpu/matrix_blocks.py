"""Blocks of arrays for the matrix-state kernels on GPU: one chunk of one head in shared memory.

An array has a kind, which determines its shape in global memory and the shape of a block:

    keys     pieces [B, T, G, K]                a block is [64, keys]; heads may share it
    logs     pieces [B, T, H, K]                [64, keys]
    rows     [B, H, chunks, pieces, 64, K]      [64, keys]
    values   pieces [B, T, H, V]                [64, columns]
    square   [B, H, chunks, pieces, 64, 64]     [64, 64]
    state    [B, H, chunks, pieces, K, V]       [keys, columns]
    vector   [B, H, chunks * 64] in float32     [64]
    carry    [B, H, chunks, K] in float32       [keys]
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_products import CHUNK, Numerics
from pallas_kernels.jax_compat import gpu_interpreter, pl

KINDS = {
    **dict.fromkeys(("q", "k", "a", "b"), "keys"),
    "logs": "logs",
    **dict.fromkeys(("q_read", "k_read", "a_read", "b_write", "k_write"), "rows"),
    **dict.fromkeys(("v", "d_out", "written", "d_right"), "values"),
    **dict.fromkeys(("scores", "b_scores", "copies", "inverse"), "square"),
    **dict.fromkeys(("states", "cotangents"), "state"),
    **dict.fromkeys(("log_decay", "beta", "upto", "after"), "vector"),
    "carry": "carry",
}
FLOAT32 = ("vector", "carry")
BUFFER_UNIT = 1024  # bytes
KEY_TILE = 64  # channels in a block of the kernels that add tiles of them
Arrays = dict[str, list[jax.Array]]  # by name, the pieces of keys and values, or one array
Blocks = dict[str, list[Any]]  # by name, references to the pieces of a block


class Pair(NamedTuple):
    """Products of pairs of steps, left_t^T D right_j.

    D are the decays of the steps after j and up to t, for "a" only up to t - 1. The result is zero
    for j > t, and unless the left factor is "q", for j = t.
    """

    name: str
    left: str
    right: str


class Variant(NamedTuple):
    """Specialization of a kernel.

    Attributes:
      num: the accuracy.
      group: number of heads that share queries and keys.
      keys: numbers of a key in a block, K or a tile of them.
      columns: columns of a state in a block.
      chunks: number of chunks.
      scale: factor of the outputs.
      decay: whether there are decays per head or resets.
      channel: whether there are decays per channel.
      delta: whether this is the delta rule.
      vectors: whether this is the generalized delta rule, whose decays are per channel.
      depth: chunks in shared memory, in flight or in use.
    """

    num: Numerics
    group: int
    keys: int
    columns: int
    chunks: int
    scale: float
    decay: bool
    channel: bool
    delta: bool
    vectors: bool = False
    depth: int = 1

    @property
    def computed(self) -> int:
        """Pieces of states, pairs and written values."""
        return self.num.exact if self.solved else self.num.inputs

    def tiled(self, columns: int, depth: int = 1) -> "Variant":
        """Return the variant with blocks of this many columns.

        All factors of a product have the same swizzle, at most a row of the narrowest block.
        """
        num = self.num._replace(swizzle=2 * columns)
        return self._replace(num=num, columns=columns, depth=depth)

    @property
    def solved(self) -> bool:
        """True if a chunk solves a triangular system for the values that it writes."""
        return self.delta or self.vectors

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The products of pairs of steps."""
        found = [Pair("scores", "q", "k")]
        if self.delta:
            found += [Pair("lower", "k", "k")]
        if self.vectors:
            found += [Pair("b_scores", "q", "b"), Pair("copies", "a", "k"), Pair("lower", "a", "b")]
        return tuple(found)

    def block_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a block."""
        return {
            **dict.fromkeys(("keys", "logs", "rows"), (CHUNK, self.keys)),
            "values": (CHUNK, self.columns),
            "square": (CHUNK, CHUNK),
            "state": (self.keys, self.columns),
            "vector": (CHUNK,),
            "carry": (self.keys,),
        }[KINDS[name]]


class Position(NamedTuple):
    """Position of a block: indices of sequence, head and chunk, slices of columns and of keys."""

    batch: Any
    head: Any
    chunk: Any
    columns: Any
    keys: Any = slice(None)

    @property
    def steps(self) -> Any:
        """The slice of steps."""
        return pl.ds(self.chunk * CHUNK, CHUNK)


def by_head(x: jax.Array, chunks: int) -> jax.Array:
    """Convert [B, T, H] to [B, H, chunks * 64], with zeros after the last step."""
    x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - x.shape[1]), (0, 0)))
    return jnp.moveaxis(x, 1, 2)


def by_step(x: jax.Array, length: int) -> jax.Array:
    """Invert `by_head`."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def total(pieces: list[jax.Array]) -> jax.Array:
    """Return the sum of pieces in float32."""
    return jnp.sum(jnp.stack([piece.astype(jnp.float32) for piece in pieces]), axis=0)


def pieces(name: str, arrays: list[jax.Array]) -> int:
    """Return the number of pieces of a block."""
    kind = KINDS[name]
    if kind in ("keys", "logs", "values"):
        return len(arrays)
    return 1 if kind in FLOAT32 else arrays[0].shape[3]


def nbytes(p: Variant, arrays: Arrays) -> int:
    """Return the bytes of one block of each array in shared memory, in units of 1 KiB each."""
    sizes = (
        (pieces(name, xs), math.prod(p.block_shape(name)) * (4 if KINDS[name] in FLOAT32 else 2))
        for name, xs in arrays.items()
    )
    return sum(count * -(-size // BUFFER_UNIT) * BUFFER_UNIT for count, size in sizes)


def buffers(p: Variant, name: str, count: int, lead: tuple[int, ...] = ()) -> list[Any]:
    """Return shared memory [*lead, *block] for each piece of a block."""
    shape = (*lead, *p.block_shape(name))
    if KINDS[name] in FLOAT32:
        return [plgpu.SMEM(shape, jnp.float32)]
    return mp.buffers(p.num, shape, jnp.bfloat16, count)


def piece(p: Variant, name: str, refs: list[Any], at: Position, index: int) -> Any:
    """Return the reference to one piece of a block in global memory."""
    match KINDS[name]:
        case "keys":
            head = lax.div(at.head, jnp.int32(p.group))
            return refs[index].at[at.batch, at.steps, head, at.keys]
        case "logs":
            return refs[index].at[at.batch, at.steps, at.head, at.keys]
        case "rows":
            return refs[0].at[at.batch, at.head, at.chunk, index, :, at.keys]
        case "values":
            return refs[index].at[at.batch, at.steps, at.head, at.columns]
        case "square":
            return refs[0].at[at.batch, at.head, at.chunk, index]
        case "state":
            return refs[0].at[at.batch, at.head, at.chunk, index, at.keys, at.columns]
        case "carry":
            return refs[0].at[at.batch, at.head, at.chunk]
        case _:
            return refs[0].at[at.batch, at.head, at.steps]


def fetch(p: Variant, name: str, refs: list[Any], at: Position, block: Any, barrier: Any) -> None:
    """Start the copies of the pieces of a block to shared memory."""
    for i, buffer in enumerate(block):
        plgpu.copy_gmem_to_smem(piece(p, name, refs, at, i), buffer, barrier)


def launch(
    name: str,
    body: Any,
    leaves: list[jax.Array],
    outputs: dict[str, Any],
    smem: Any,
    grid: dict[str, int],
    interpret: bool,
) -> dict[str, jax.Array]:
    """Run a kernel with one warpgroup in a thread block; return its outputs by name."""
    found = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types={"smem": smem},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=gpu_interpreter() if interpret else None,
        kernel_name=name,
    )(*leaves)
    return dict(zip(outputs, found, strict=True))
