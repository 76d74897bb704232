"""Products of matrices on the tensor cores of Hopper, for the matrix-state kernels on GPU.

The tensor cores multiply bfloat16 numbers and add in float32. A float32 number is split into
bfloat16 numbers, the pieces. Their sum has 16 correct bits (two pieces) or 24 (three). The product
of two split matrices is the sum of the products of their pieces, without those below the accuracy.

Registers of a warpgroup hold a matrix [64 n, m] in the layout of an accumulator, `WGMMA`. The right
factor of a product is in shared memory, the left factor in shared memory or in registers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jax_compat import gpu_load, pl

CHUNK = 64  # steps in a chunk: the rows of a tensor core's product
WGMMA = plgpu.Layout.WGMMA
Pieces = Sequence[Any]  # references to shared memory, or arrays in registers


class Numerics(NamedTuple):
    """Accuracy of products.

    Attributes:
      inputs: pieces of an input: one for bfloat16, three for float32.
      exact: pieces of a computed value that must not be rounded to bfloat16.
      swizzle: bytes of the swizzle of matrices in shared memory.
      interpret: whether the kernel is interpreted on a CPU.
    """

    inputs: int
    exact: int
    swizzle: int
    interpret: bool


def split(x: jax.Array, count: int) -> list[jax.Array]:
    """Split float32 numbers into bfloat16 numbers; a bfloat16 array is one piece.

    Rounding uses bit operations, because a compiler may drop a cast to bfloat16 and back.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    pieces = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        bits = (bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        pieces.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*pieces, x.astype(jnp.bfloat16)]


def buffers(num: Numerics, shape: tuple[int, ...], dtype: Any, count: int = 1) -> list[Any]:
    """Return matrices [..., rows, columns] in shared memory, in the layout of the tensor cores."""
    columns = num.swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(num.swizzle))
    return [plgpu.SMEM(shape, dtype, transforms=transforms) for _ in range(count)]


def store(refs: Pieces, pieces: Sequence[jax.Array]) -> None:
    """Write pieces to shared memory for the tensor cores and the copy engine.

    A product has ended for the warp that waited for it, and other warps may still read its factors.
    Pallas synchronizes the warps before and after each write.
    """
    for ref, piece in zip(refs, pieces, strict=True):
        ref[...] = piece
    plgpu.commit_smem()


def load(ref: Any) -> jax.Array:
    """Read a matrix from shared memory into registers."""
    return gpu_load(ref, WGMMA)


def joined(refs: Pieces) -> jax.Array:
    """Read a split matrix from shared memory into registers, as float32 numbers."""
    first, *rest = (load(ref).astype(jnp.float32) for ref in refs)
    return sum(rest, start=first)


def ones(mask: jax.Array) -> jax.Array:
    """Convert a mask to bfloat16 numbers."""
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def by_row(ref: Any, shape: tuple[int, ...]) -> jax.Array:
    """Read a vector from shared memory; element t is the value of row t of the result."""
    vector = gpu_load(ref, WGMMA.reduce(1))
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (0,)), WGMMA)


def scaled(ref: Any, value: jax.Array) -> jax.Array:
    """Multiply rows by the factors in a vector; zero where the factor is, also for NaN."""
    factor = by_row(ref, value.shape)
    return jnp.where(factor == 0.0, 0.0, factor * value)


def by_column(ref: Any, shape: tuple[int, ...]) -> jax.Array:
    """Read a vector from shared memory; element j is the value of column j of the result."""
    vector = gpu_load(ref, WGMMA.reduce(0))
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (1,)), WGMMA)


def zeros(*shape: int) -> jax.Array:
    """Return a vector of values of rows, or a matrix, in registers."""
    layout = WGMMA if len(shape) == 2 else WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def row_indices(shape: tuple[int, ...]) -> jax.Array:
    """Return the row index of every element of a matrix in registers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)


def column_indices(shape: tuple[int, ...]) -> jax.Array:
    """Return the column index of every element of a matrix in registers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)


def transposed(refs: Pieces) -> list[Any]:
    """Return the transposes of matrices in shared memory, which the tensor cores read as such."""
    return [ref.transpose((1, 0)) for ref in refs]


def factors(left: Pieces, right: Pieces) -> list[tuple[Any, Any]]:
    """Return the pairs of pieces whose products sum to that of split matrices, smallest first."""
    accuracy = max(len(left), len(right))
    return [
        (a, b)
        for i, a in reversed(list(enumerate(left)))
        for j, b in reversed(list(enumerate(right)))
        if i + j < accuracy
    ]


def product(
    num: Numerics,
    left: Pieces,
    right: Pieces,
    add: jax.Array | None = None,
    *,
    in_registers: bool = False,
) -> jax.Array:
    """Multiply split matrices, and add a matrix in registers.

    `in_registers` says that the pieces of `left` are in registers.
    """
    terms = factors(left, right)

    def multiply(accumulator: Any) -> None:
        for a, b in terms:
            plgpu.wgmma(accumulator, a, b)

    def multiplied(accumulator: Any) -> jax.Array:
        multiply(accumulator)
        return accumulator[...]

    shape = (left[0].shape[0], right[0].shape[1])
    if not num.interpret and add is not None:
        return pl.run_state(multiply)(plgpu.ACC.init(add))
    if num.interpret and in_registers:  # the interpreter has no left factors in registers
        dot = jnp.zeros(shape, jnp.float32)
        for a, b in terms:
            dot += jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
    else:
        dot = pl.run_scoped(multiplied, plgpu.ACC(shape, jnp.float32))
    return dot if add is None else add + dot
