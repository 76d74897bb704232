"""One pass of a recurrence over [B, T, D] on GPU: the pipeline of copies around an op's steps.

A thread block has 128 features of one sequence, one for each thread, and iterates over all of time.
Arrays keep the user's layout, [B, T, D], or [B, T, R, D] for R numbers per feature. The copy engine
(TMA) prefetches blocks of time to shared memory, several ahead, and stores the blocks of outputs.
It fills elements that are out of bounds with zeros. The op supplies the steps as a `BlockProgram`.
The kernel uses Mosaic GPU and requires Hopper or newer.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma
from pallas_kernels.gpu.limits import BLOCK_FEATURES
from pallas_kernels.gpu.tma import MAX_PREFETCH_DEPTH, MIN_RESETS, OUTPUT_SLOTS, SMEM_TIMED
from pallas_kernels.jax_compat import array_like, pl

Arrays = Mapping[str, tuple[jax.Array, ...]]
Shapes = Mapping[str, tuple[jax.ShapeDtypeStruct, ...]]


class BlockLayout(NamedTuple):
    """Division of [T, D] into blocks.

    Attributes:
      length: T.
      block_length: time steps per block.
      prefetch_depth: blocks of time in shared memory, in flight or in use.
      width: D.
      reverse: whether time runs from the last row to the first.
      interpret: whether the kernel is interpreted on a CPU.
    """

    length: int
    block_length: int
    prefetch_depth: int
    width: int
    reverse: bool
    interpret: bool

    @property
    def time_blocks(self) -> int:
        """Number of blocks of time."""
        return -(-self.length // self.block_length)

    @property
    def column_blocks(self) -> int:
        """Number of blocks of features."""
        return -(-self.width // BLOCK_FEATURES)

    @property
    def group_length(self) -> int:
        """Number of time steps that are unrolled together."""
        return min(self.block_length, 8)


class SharedMemory(NamedTuple):
    """References to the buffers in shared memory, by the names of the arrays.

    Attributes:
      timed_inputs: refs [prefetch depth, block length, (R,) 128] of inputs with a time axis. "edge"
        is [prefetch depth, (R,) 128], "reset" [prefetch depth, block length].
      fixed_inputs: refs [(R,) 128] of inputs without a time axis.
      timed_outputs: refs [OUTPUT_SLOTS, block length, (R,) 128] of outputs with a time axis.
      final_outputs: refs [(R,) 128] of outputs that are stored after the last step.
    """

    timed_inputs: dict[str, list[Any]]
    fixed_inputs: dict[str, list[Any]]
    timed_outputs: dict[str, list[Any]]
    final_outputs: dict[str, list[Any]]


class GlobalMemory(NamedTuple):
    """References to the arrays in global memory, by name."""

    timed_inputs: Mapping[str, tuple[Any, ...]]
    fixed_inputs: Mapping[str, tuple[Any, ...]]
    outputs: Mapping[str, tuple[Any, ...]]


class BlockPosition(NamedTuple):
    """Index of a block of time, and its slots in `timed_inputs` and in `timed_outputs`."""

    block: Any
    input_slot: Any
    output_slot: Any


class BlockProgram(NamedTuple):
    """Computation of an op.

    Attributes:
      start: smem -> (constants, first carry).
      run_block: (smem, constants, position, carry) -> carry. Takes the carry through a block of
        time, and writes the block of `timed_outputs`.
      finish: carry -> values of `final_outputs`, by name, in the order of their rows.
    """

    start: Callable[[SharedMemory], tuple[Any, Any]]
    run_block: Callable[[SharedMemory, Any, BlockPosition, Any], Any]
    finish: Callable[[Any], Mapping[str, tuple[Any, ...]]]


def step_bytes(arrays: Arrays | Shapes) -> int:
    """Return the bytes of one time step of the arrays, for one thread block."""
    flat = (x for group in arrays.values() for x in group)
    return sum(
        BLOCK_FEATURES * math.prod(x.shape[2:-1]) * jnp.dtype(x.dtype).itemsize for x in flat
    )


def choose_blocks(
    op: str,
    length: int,
    width: int,
    input_bytes: int,
    output_bytes: int,
    block_sizes: tuple[int, int] | None,
) -> tuple[int, int]:
    """Return the block length and the prefetch depth.

    `input_bytes` and `output_bytes` are the shared memory of one time step.

    Raises:
      NotImplementedError: if the requested block sizes do not fit.
    """
    if block_sizes is None:
        block_length = tma.preferred_block_length(length, input_bytes, output_bytes)
        depth = _prefetch_depth(block_length, input_bytes, output_bytes)
        if depth < 2:
            raise NotImplementedError(
                f"{op}: the GPU kernel has no shared memory for "
                f"{(input_bytes + output_bytes) // BLOCK_FEATURES} bytes per "
                "step and feature; use implementation='xla' or None."
            )
        return block_length, depth
    block_length, columns = block_sizes
    if columns != BLOCK_FEATURES and not columns == width < BLOCK_FEATURES:
        raise NotImplementedError(
            f"{op}: on GPU `block_sizes` must have {BLOCK_FEATURES} features, got {columns}."
        )
    longest = min(256, SMEM_TIMED // (2 * input_bytes + OUTPUT_SLOTS * output_bytes) // 16 * 16)
    if block_length > longest:
        raise NotImplementedError(
            f"{op}: on GPU `block_sizes` must have at most {longest} steps for these arrays, got "
            f"{block_length}."
        )
    return block_length, _prefetch_depth(block_length, input_bytes, output_bytes)


def _prefetch_depth(block_length: int, input_bytes: int, output_bytes: int) -> int:
    room = SMEM_TIMED // block_length - OUTPUT_SLOTS * output_bytes
    return min(MAX_PREFETCH_DEPTH, room // input_bytes)


def check_alignment(op: str, *groups: Arrays | Shapes) -> None:
    """Check that the copy engine supports the rows of all arrays.

    Raises:
      NotImplementedError: if the size of a row is not a multiple of 16 bytes.
    """
    arrays: list[Any] = [x for group in groups for xs in group.values() for x in xs]
    tma.check_alignment(op, arrays)


def run(
    name: str,
    layout: BlockLayout,
    program: BlockProgram,
    *,
    timed_inputs: Arrays,
    fixed_inputs: Arrays,
    timed_outputs: Shapes,
    final_outputs: Shapes,
    reset: jax.Array | None = None,
    edge: str | None = None,
) -> dict[str, tuple[jax.Array, ...]]:
    """Run a program over all blocks.

    Args:
      name: name of the kernel.
      layout: the blocks.
      program: the computation.
      timed_inputs: by name, arrays [S, T, (R,) D] that are copied in blocks of time. S divides B.
      fixed_inputs: arrays [S, (R,) D] that are copied once.
      timed_outputs: arrays [B, T, (R,) D] that are stored in blocks of time.
      final_outputs: arrays [B, (R,) D] that are stored once; at least one.
      reset: [B, T] bool, available to the program as the timed input "reset", in int32.
      edge: name of a timed input, or None. The program gets the row of this input that precedes
        each block in the order of the array's recurrence, as the timed input "edge".

    Returns:
      The arrays of `timed_outputs` and `final_outputs`, by name.
    """
    inputs = {"fixed": dict(fixed_inputs), "timed": dict(timed_inputs)}
    outputs = {**timed_outputs, **final_outputs}

    def buffers(lead: tuple[int, ...], skipped: int, arrays: Any) -> dict[str, list[Any]]:
        return {
            name: [
                plgpu.SMEM((*lead, *x.shape[skipped:-1], BLOCK_FEATURES), x.dtype) for x in group
            ]
            for name, group in arrays.items()
        }

    depth, block_length = layout.prefetch_depth, layout.block_length
    smem = SharedMemory(
        buffers((depth, block_length), 2, timed_inputs),
        buffers((), 1, fixed_inputs),
        buffers((OUTPUT_SLOTS, block_length), 2, timed_outputs),
        buffers((), 1, final_outputs),
    )
    if edge is not None:
        smem.timed_inputs["edge"] = buffers((depth,), 2, {edge: timed_inputs[edge]})[edge]
    if reset is not None:
        inputs["timed"]["reset"] = (tma.reset_words(reset),)
        smem.timed_inputs["reset"] = [plgpu.SMEM((depth, max(block_length, MIN_RESETS)), jnp.int32)]
    leaves, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(outputs)
    batch = shapes[0].shape[0]

    def kernel(*refs: Any, fixed_barrier: Any, smem: SharedMemory, timed_barrier: Any) -> None:
        by_kind = jax.tree.unflatten(tree, refs[: len(leaves)])
        if edge is not None:
            by_kind["timed"]["edge"] = by_kind["timed"][edge]
        stored = jax.tree.unflatten(out_tree, refs[len(leaves) :])
        gmem = GlobalMemory(by_kind["timed"], by_kind["fixed"], stored)
        _kernel(layout, program, gmem, smem, fixed_barrier, timed_barrier)

    arrivals = sum(map(len, smem.timed_inputs.values()))
    out = tma.launch(
        kernel,
        leaves,
        [array_like(leaves[0], s.shape, s.dtype) for s in shapes],
        {
            "fixed_barrier": plgpu.Barrier(num_arrivals=sum(map(len, smem.fixed_inputs.values()))),
            "smem": smem,
            "timed_barrier": plgpu.Barrier(num_arrivals=arrivals, num_barriers=depth),
        },
        batch * layout.column_blocks,
        name=name,
        interpret=layout.interpret,
    )
    return jax.tree.unflatten(out_tree, out)


def _kernel(
    layout: BlockLayout,
    program: BlockProgram,
    gmem: GlobalMemory,
    smem: SharedMemory,
    fixed_barrier: Any,
    timed_barrier: Any,
) -> None:
    sequence, column = tma.sequence_and_column(layout.column_blocks)
    columns = pl.ds(column * BLOCK_FEATURES, BLOCK_FEATURES)
    depth = layout.prefetch_depth

    def shared_sequence(source: Any) -> Any:
        """Return the index into an array with fewer sequences, which is repeated over the batch."""
        return lax.rem(sequence, jnp.int32(source.shape[0]))

    def whole_axes(buffer: Any, lead: int) -> tuple[Any, ...]:
        """Return the index of all R numbers of a feature."""
        return (slice(None),) * (len(buffer.shape) - lead - 1)

    def block_at(iteration: Any) -> Any:
        return layout.time_blocks - 1 - iteration if layout.reverse else iteration

    def fetch(iteration: Any) -> None:
        """Start the copies of a block of time to its slot."""
        slot = lax.rem(iteration, jnp.int32(depth))
        start = block_at(iteration) * layout.block_length
        # In a reverse pass the edge is the row before the block, else the row after the block.
        edge_row = jnp.maximum(start - 1, 0) if layout.reverse else start + layout.block_length
        for name, refs in smem.timed_inputs.items():
            for source, buffer in zip(gmem.timed_inputs[name], refs, strict=True):
                index: tuple[Any, ...] = (
                    shared_sequence(source),
                    pl.ds(start, layout.block_length),
                )
                if name == "reset":
                    index = (sequence, pl.ds(start, buffer.shape[-1]))
                elif name == "edge":
                    row = jnp.minimum(edge_row, layout.length - 1)
                    index = (shared_sequence(source), row, *whole_axes(buffer, 1), columns)
                else:
                    index = (*index, *whole_axes(buffer, 2), columns)
                plgpu.copy_gmem_to_smem(source.at[index], buffer.at[slot], timed_barrier.at[slot])

    def store(tile: Any, target: Any, start: Any, count: int) -> None:
        """Start a copy of rows with several numbers per feature, which are strided."""
        index = (sequence, pl.ds(start, count), *whole_axes(tile, 1), columns)
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, count)], target.at[index], commit_group=False)

    lax.fori_loop(0, depth, lambda i, _: fetch(i.astype(jnp.int32)), None)
    for name, refs in smem.fixed_inputs.items():
        for source, buffer in zip(gmem.fixed_inputs[name], refs, strict=True):
            index = (shared_sequence(source), *whole_axes(buffer, 0), columns)
            plgpu.copy_gmem_to_smem(source.at[index], buffer, fixed_barrier)
    plgpu.barrier_wait(fixed_barrier)
    constants, carry = program.start(smem)

    def block_of_time(i: Any, carry: Any) -> Any:
        iteration = i.astype(jnp.int32)
        block, slot = block_at(iteration), lax.rem(iteration, jnp.int32(depth))
        output_slot = lax.rem(iteration, jnp.int32(OUTPUT_SLOTS))
        plgpu.barrier_wait(timed_barrier.at[slot])
        plgpu.wait_smem_to_gmem(OUTPUT_SLOTS - 1, wait_read_only=True)
        carry = program.run_block(smem, constants, BlockPosition(block, slot, output_slot), carry)
        plgpu.commit_smem()
        for name, refs in smem.timed_outputs.items():
            for buffer, target in zip(refs, gmem.outputs[name], strict=True):
                tile, start = buffer.at[output_slot], block * layout.block_length
                if len(target.shape) == 3:
                    tma.store_tile(tile, target, (sequence,), start, layout.length, column)
                else:
                    last = block == layout.time_blocks - 1
                    copy = functools.partial(store, tile, target, start)
                    tma.copy_in_bounds(layout.length, layout.block_length, last, copy)
        plgpu.commit_smem_to_gmem_group()
        pl.when(iteration + depth < layout.time_blocks)(lambda: fetch(iteration + depth))
        return carry

    values = program.finish(lax.fori_loop(0, layout.time_blocks, block_of_time, carry))
    for name, refs in smem.final_outputs.items():
        for buffer, value in zip(refs, values[name], strict=True):
            if len(buffer.shape) == 1:
                buffer[...] = value
            else:
                for r, row in enumerate(value):
                    buffer[r] = row
    plgpu.commit_smem()
    for name, refs in smem.final_outputs.items():
        for buffer, target in zip(refs, gmem.outputs[name], strict=True):
            if len(buffer.shape) == 1:
                tma.store_row(buffer, target, (sequence,), column, layout.column_blocks)
            else:
                index = (sequence, *whole_axes(buffer, 0), columns)
                plgpu.copy_smem_to_gmem(buffer, target.at[index], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
