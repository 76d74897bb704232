"""Copies between global and shared memory by the copy engine (TMA), for the GPU kernels.

A thread block has 128 features, one for each of its threads. Copies to shared memory fill the part
that is out of bounds with zeros. A copy to contiguous global memory has no bounds check: it would
overwrite the next row or sequence. The functions here therefore never store elements that are out
of bounds in contiguous memory.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import BLOCK_FEATURES, COPY_BYTES, whole_rows
from pallas_kernels.jax_compat import gpu_interpreter, pl

MAX_PREFETCH_DEPTH = 4  # blocks of time in shared memory, in flight or in use, if they fit
OUTPUT_SLOTS = 2  # blocks of outputs in shared memory, one being written and one being stored
MIN_RESETS = 32  # resets in a block of time, at least: a copy starts at a multiple of 128 bytes
# Bytes of shared memory of a thread block.
SMEM_PREFERRED = 100 * 2**10  # for blocks of time, so that two thread blocks fit a multiprocessor
SMEM_HALF = 112 * 2**10  # at most, so that two thread blocks fit
SMEM_WHOLE = 225 * 2**10  # at most for one thread block, without barriers and single rows
SMEM_TIMED = 208 * 2**10  # at most for blocks of time, of the 227 KiB of one thread block


def check_alignment(op: str, arrays: Iterable[jax.Array]) -> None:
    """Check that the copy engine supports the rows of the arrays.

    Raises:
      NotImplementedError: if the size of a row is not a multiple of 16 bytes.
    """
    for array in arrays:
        width, size = array.shape[-1], array.dtype.itemsize
        if not whole_rows(width, size):
            raise NotImplementedError(
                f"{op}: the GPU kernel must have rows of multiples of {COPY_BYTES} bytes, got "
                f"D={width} numbers of {array.dtype}; make D a multiple of {COPY_BYTES // size}, "
                "or use implementation='xla' or None."
            )


def preferred_block_length(length: int, input_bytes: int, output_bytes: int) -> int:
    """Return the number of time steps per block: a power of two, at most 64.

    `input_bytes` and `output_bytes` are the shared memory of one time step.
    """
    step_bytes = MAX_PREFETCH_DEPTH * input_bytes + OUTPUT_SLOTS * output_bytes
    exponent = (SMEM_PREFERRED // step_bytes).bit_length() - 1
    return 1 << max(2, min(6, exponent, (length - 1).bit_length()))


def reset_words(reset: jax.Array) -> jax.Array:
    """Convert [B, T] bool to int32, in rows padded to multiples of 16 bytes."""
    return jnp.pad(reset.astype(jnp.int32), ((0, 0), (0, -reset.shape[1] % 4)))


def broadcast_flag(flag: Any) -> jax.Array:
    """Broadcast a scalar to all threads."""
    return jnp.broadcast_to(flag, (BLOCK_FEATURES,))


def memory_layout(row: Any) -> jax.Array:
    """Give a row [128] the layout of rows read from memory, which a loop's carry must keep."""
    return plgpu.layout_cast(row, plgpu.Layout.WG_STRIDED((BLOCK_FEATURES,), vec_size=1))


def zero_row(dtype: Any) -> jax.Array:
    """Return a row of zeros in the layout of rows read from memory."""
    return memory_layout(jnp.zeros((BLOCK_FEATURES,), dtype))


def sequence_and_column(column_blocks: int) -> tuple[Any, Any]:
    """Return the sequence of this thread block, and its index among the blocks of features."""
    index, count = lax.axis_index("block"), jnp.int32(column_blocks)
    return lax.div(index, count), lax.rem(index, count)


def store_tile(
    smem: Any, gmem: Any, leading: tuple[Any, ...], start: Any, length: int, column: Any
) -> None:
    """Start a copy of a tile [rows, 128] to `gmem[*leading, start:, columns]`, within bounds.

    `gmem` has `length` rows there. The tile may be out of bounds in rows and in columns.
    """
    rows, width = smem.shape[0], gmem.shape[-1]
    column_blocks = -(-width // BLOCK_FEATURES)

    def copy(count: int) -> None:
        index = (*leading, pl.ds(start, count))
        if count > 1:  # strided at the ragged edge, where the copy engine checks the bounds
            tile = smem.at[pl.ds(0, count)]
            columns = pl.ds(column * BLOCK_FEATURES, BLOCK_FEATURES)
            plgpu.copy_smem_to_gmem(tile, gmem.at[(*index, columns)], commit_group=False)
        else:
            store_row(smem.at[0], gmem, (*leading, start), column, column_blocks)

    copy_in_bounds(length, rows, start + rows > length, copy)


def store_row(
    smem: Any, gmem: Any, leading: tuple[Any, ...], column: Any, column_blocks: int
) -> None:
    """Start a copy of 128 numbers to a row `gmem[*leading]`, within the bounds of the row."""

    def copy(count: int) -> None:
        target = gmem.at[(*leading, pl.ds(column * BLOCK_FEATURES, count))]
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, count)], target, commit_group=False)

    copy_in_bounds(gmem.shape[-1], BLOCK_FEATURES, column == column_blocks - 1, copy)


def copy_in_bounds(size: int, block: int, last: Any, copy: Callable[[int], None]) -> None:
    """Copy a whole block, or only the elements in bounds if this is a ragged last block."""
    if size % block == 0:
        copy(block)
    else:
        lax.cond(last, lambda: copy(size % block), lambda: copy(block))


def launch(
    body: Callable[..., None],
    arrays: Iterable[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    thread_blocks: int,
    *,
    name: str,
    interpret: bool,
    approximate_math: bool = False,
) -> list[jax.Array]:
    """Run a kernel on a number of thread blocks.

    `approximate_math` selects the hardware's approximate exponential.
    """
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(thread_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            # Only the copy engine reads what a thread writes to shared memory. Where other threads
            # do, the kernel has its own barriers.
            unsafe_no_auto_barriers=True,
            approx_math=approximate_math,
            # Warpgroup lowering takes minutes for the thousands of operations of an unrolled loop.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=gpu_interpreter() if interpret else None,
        kernel_name=name,
    )(*arrays)
