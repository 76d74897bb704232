"""What the kernels for GPU have in common: blocks that the copy engine brings and takes away.

A thread block has 128 features, one for each of its threads. What is brought is filled up with
zeros where it hangs over the end of an array. What is taken away is not always cut off there: a
copy of contiguous memory is a plain one, which would land in the next row or sequence, so that
nothing that is sent ever hangs over in memory that is contiguous.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import ROW_BYTES, WIDTH, whole_rows
from pallas_kernels.jax_compat import gpu_interpreter, pl

AHEAD = 4  # blocks of time on their way to shared memory, or in use there, if that fits
BEHIND = 2  # blocks on their way back, or being made
MARKS = 32  # resets of a block of time, at least: what is copied starts at multiples of 128 bytes
SHARED = 100 * 2**10  # bytes of shared memory for a thread block, so that two fit a multiprocessor
HALF = 112 * 2**10  # and what it can have at most, if two are to fit
WHOLE = 225 * 2**10  # and alone, less a little for barriers and single rows
MOST = 208 * 2**10  # and the most that it can have (227), less what is not kept by block of time


def check_alignment(op: str, arrays: Iterable[jax.Array]) -> None:
    """Refuse rows that the copy engine cannot take.

    Raises:
      NotImplementedError: for rows of no multiple of 16 bytes.
    """
    for array in arrays:
        width, size = array.shape[-1], array.dtype.itemsize
        if not whole_rows(width, size):
            raise NotImplementedError(
                f"{op}: the GPU kernel copies rows of multiples of {ROW_BYTES} bytes, D={width} "
                f"numbers of {array.dtype} are not; make D a multiple of {ROW_BYTES // size}, or "
                "use implementation='xla' or None."
            )


def steps(length: int, fetched: int, made: int) -> int:
    """Of time in a block, a power of two up to 64.

    A step takes so many bytes of shared memory for what is fetched and for what is made.
    """
    most = (SHARED // (AHEAD * fetched + BEHIND * made)).bit_length() - 1
    return 1 << max(2, min(6, most, (length - 1).bit_length()))


def marks(reset: jax.Array) -> jax.Array:
    """[B, T] bool as numbers, in rows of whole 16 bytes."""
    return jnp.pad(reset.astype(jnp.int32), ((0, 0), (0, -reset.shape[1] % 4)))


def everywhere(flag: Any) -> jax.Array:
    """A scalar for every thread."""
    return jnp.broadcast_to(flag, (WIDTH,))


def zeros(dtype: Any) -> jax.Array:
    """As what is read from memory is laid out, so that a loop can carry either."""
    layout = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)
    return plgpu.layout_cast(jnp.zeros((WIDTH,), dtype), layout)


def position(across: int) -> tuple[Any, Any]:
    """This thread block's sequence, and which of `across` blocks of features it has."""
    index, count = lax.axis_index("block"), jnp.int32(across)
    return lax.div(index, count), lax.rem(index, count)


def send(
    near: Any, far: Any, leading: tuple[Any, ...], start: Any, length: int, column: Any
) -> None:
    """Have a tile [rows, 128] in shared memory taken to `far[*leading, start:, columns]`.

    `far` has `length` rows there; the tile may hang over them, and over the columns.
    """
    rows, width = near.shape[0], far.shape[-1]
    across = -(-width // WIDTH)

    def take(count: int) -> None:
        where = (*leading, pl.ds(start, count))
        if count > 1:  # strided if it hangs over: the copy engine cuts it off
            tile, columns = near.at[pl.ds(0, count)], pl.ds(column * WIDTH, WIDTH)
            plgpu.copy_smem_to_gmem(tile, far.at[(*where, columns)], commit_group=False)
        else:
            send_row(near.at[0], far, (*leading, start), column, across)

    exactly(length, rows, start + rows > length, take)


def send_row(near: Any, far: Any, leading: tuple[Any, ...], column: Any, across: int) -> None:
    """Have 128 numbers in shared memory taken to a row `far[*leading]`, which may end before."""

    def take(count: int) -> None:
        where = far.at[(*leading, pl.ds(column * WIDTH, count))]
        plgpu.copy_smem_to_gmem(near.at[pl.ds(0, count)], where, commit_group=False)

    exactly(far.shape[-1], WIDTH, column == across - 1, take)


def exactly(size: int, block: int, last: Any, copy: Callable[[int], None]) -> None:
    """Copy a whole block, or what there is of the last one if blocks do not divide `size`."""
    if size % block == 0:
        copy(block)
    else:
        lax.cond(last, lambda: copy(size % block), lambda: copy(block))


def launch(
    body: Callable[..., None],
    arrays: Iterable[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    blocks: int,
    *,
    name: str,
    interpret: bool,
    approximate: bool = False,
) -> list[jax.Array]:
    """Run so many thread blocks; `approximate` takes the unit's own exponentials."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            # What a thread writes to shared memory is read by the copy engine, or by other threads
            # where the kernel has them wait for each other.
            unsafe_no_auto_barriers=True,
            approx_math=approximate,
            # The other way takes minutes for the thousands of operations of an unrolled loop.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=gpu_interpreter() if interpret else None,
        kernel_name=name,
    )(*arrays)
