"""The kernel of cells with matrices on GPU: copies, products and the loop over time.

The matrices of the cell stay in shared memory, in bfloat16 pieces (`gpu/matrix_products.py`). The
copy engine prefetches the inputs of the next steps. The state and the elementwise part stay in
registers. A warpgroup has 64 channels of all sequences of the thread block, [64, sequences], in the
layout of an accumulator. Before a product, each warpgroup writes its part of the other factor to
shared memory, and all warpgroups of the thread block synchronize. `row_function` decides which
products run together.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_products import WGMMA
from pallas_kernels.jax_compat import array_like, gpu_interpreter, pl
from pallas_kernels.nonlinear_scan.cell_program import CellProgram, Row, is_float
from pallas_kernels.nonlinear_scan.gpu_dense_layout import TILE, DenseLayout, dense_layout
from pallas_kernels.nonlinear_scan.row_arrays import Sizes
from pallas_kernels.nonlinear_scan.row_function import Multiply, RowFunction, Term, evaluate

Arrays = dict[str, list[Any]]


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      matrices: for each matrix, its pieces [tiles, tiles, 64, 64].
      operands: for each slot, pieces [2, tiles, sequences, 64], for even and odd steps.
      timed: by name, inputs of the next steps [tiles, depth, rows, 64, sequences].
      loaded: completed when the matrices have arrived.
      arrived: for each warpgroup and slot of `timed`, completed when the inputs have arrived.
      written: completed when all warpgroups have written their part of a factor.
    """

    matrices: list[list[Any]]
    operands: list[list[Any]]
    timed: Arrays
    loaded: Any
    arrived: Any
    written: Any


class Call(NamedTuple):
    """A kernel.

    Attributes:
      name: its name.
      program: the cell.
      function: the computation of a step.
      timed: inputs [B, T, (R,) D], by name.
      outputs: for each output [B, T, R, D], by name, R and the dtype.
      reset: [B, T] bool or None.
      pieces: bfloat16 numbers that stand for a float32 number in products.
    """

    name: str
    program: CellProgram
    function: RowFunction
    timed: Arrays
    outputs: dict[str, list[tuple[int, Any]]]
    reset: jax.Array | None
    pieces: int


class Step(NamedTuple):
    """Access to a step, for the function that computes it.

    Attributes:
      rows: by name, the rows of the inputs with a time axis.
      reset: a row that is true where the state is cleared, or None.
      params: the rows of the parameters.
      evaluate: rows -> the results of the call's function.
      write: (name, rows) -> None; stores rows of an output with a time axis.
    """

    rows: dict[str, list[Row]]
    reset: Row | None
    params: list[Row]
    evaluate: Callable[[Sequence[Any]], list[Row]]
    write: Callable[[str, Sequence[Row]], None]


def run(
    call: Call,
    step: Callable[[Step, Sequence[Row]], Sequence[Row]],
    carry: jax.Array,
    *,
    reverse: bool,
    interpret: bool,
) -> tuple[dict[str, list[jax.Array]], jax.Array]:
    """Run a kernel over all steps.

    Args:
      call: the kernel.
      step: (access to the step, rows of the carry) -> the next rows.
      carry: [B, (R,) D], float32.
      reverse: whether time runs backward.
      interpret: run in interpret mode.

    Returns:
      the outputs with a time axis [B, T, R, D] by name, and the last carry [B, R, D].
    """
    program = call.program
    at = dense_layout(
        call.timed,
        len(program.matrices),
        len(call.function.slots),
        call.pieces,
        resets=call.reset is not None,
        reverse=reverse,
        interpret=interpret,
    )
    first = at.blocks(carry[:, None])
    timed = {name: [at.blocks(x) for x in xs] for name, xs in call.timed.items()}
    if call.reset is not None:
        timed["reset"] = [at.resets(call.reset)]
    inputs = {
        "carry": first,
        "matrices": [at.matrix(x) for x in program.matrices],
        "params": [at.vectors(x) for x in program.param_arrays],
        "timed": timed,
    }
    leaves, tree = jax.tree.flatten(inputs)
    shapes = {
        name: [array_like(first, at.shape(at.length, rows), dtype) for rows, dtype in of_name]
        for name, of_name in call.outputs.items()
    }
    shapes["carry"] = [array_like(first, first.shape, first.dtype)]
    out_leaves, out_tree = jax.tree.flatten(shapes)

    def body(*refs: Any, smem: SharedMemory) -> None:
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        _kernel(at, call, step, sources, jax.tree.unflatten(out_tree, refs[len(leaves) :]), smem)

    found = plgpu.kernel(
        body,
        out_type=out_leaves,
        scratch_types={"smem": _shared_memory(at, call, timed)},
        grid=(at.groups,),
        grid_names=("group",),
        num_threads=at.tiles,
        thread_name="tile",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # The kernel has its own barriers, two in a step with one product.
            unsafe_no_auto_barriers=True,
        ),
        interpret=gpu_interpreter() if interpret else None,
        kernel_name=call.name,
    )(*leaves)
    outputs = jax.tree.unflatten(out_tree, found)
    [last] = outputs.pop("carry")
    return {name: [at.rows(x) for x in xs] for name, xs in outputs.items()}, at.rows(last)[:, 0]


def _shared_memory(at: DenseLayout, call: Call, timed: Arrays) -> SharedMemory:
    num = mp.Numerics(at.pieces, at.pieces, 128, at.interpret)
    square, operand = (at.tiles, at.tiles, TILE, TILE), (2, at.tiles, at.sequences, TILE)
    matrices, slots = len(call.program.matrices), len(call.function.slots)

    def ring(name: str, x: jax.Array) -> Any:
        shape = x.shape[2:] if name == "reset" else x.shape[3:]
        return plgpu.SMEM((at.tiles, at.depth, *shape), x.dtype)

    return SharedMemory(
        matrices=[mp.buffers(num, square, jnp.bfloat16, at.pieces) for _ in range(matrices)],
        operands=[mp.buffers(num, operand, jnp.bfloat16, at.pieces) for _ in range(slots)],
        timed={name: [ring(name, x) for x in xs] for name, xs in timed.items()},
        loaded=plgpu.Barrier(num_arrivals=matrices * at.pieces * at.tiles**2),
        arrived=plgpu.Barrier(
            num_arrivals=sum(map(len, timed.values())), num_barriers=at.tiles * at.depth
        ),
        written=plgpu.Barrier(num_arrivals=at.tiles),
    )


def _kernel(
    at: DenseLayout,
    call: Call,
    step: Callable[[Step, Sequence[Row]], Sequence[Row]],
    sources: dict[str, Any],
    targets: Arrays,
    smem: SharedMemory,
) -> None:
    group, tile = lax.axis_index("group"), lax.axis_index("tile")

    @pl.when(tile == 0)
    def _load() -> None:
        pairs = zip(sources["matrices"], smem.matrices, strict=True)
        for source, buffer in (p for refs in pairs for p in zip(*refs, strict=True)):
            for i, j in itertools.product(range(at.tiles), repeat=2):
                plgpu.copy_gmem_to_smem(source.at[i, j], buffer.at[i, j], smem.loaded)

    def position(iteration: Any) -> tuple[Any, Any, Any]:
        """Return the time step, the slot, and the barrier of an iteration."""
        slot = lax.rem(iteration, jnp.int32(at.depth))
        t = at.length - 1 - iteration if at.reverse else iteration
        return t, slot, smem.arrived.at[tile * at.depth + slot]

    def fetch(iteration: Any) -> None:
        """Start the copies of the inputs of a step."""
        t, slot, barrier = position(iteration)
        for name, buffers in smem.timed.items():
            index = (group, t) if name == "reset" else (group, tile, t)
            for source, buffer in zip(sources["timed"][name], buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[index], buffer.at[tile, slot], barrier)

    for i in range(at.depth):
        fetch(jnp.int32(i))
    params = [
        _widen(mp.by_row(ref.at[r, tile], at.row))
        for ref in sources["params"]
        for r in range(ref.shape[0])
    ]
    source = sources["carry"]
    carry = [mp.load(source.at[group, tile, 0, r]) for r in range(source.shape[3])]
    plgpu.barrier_wait(smem.loaded)

    def run_step(i: Any, carry: Sequence[Row]) -> list[Row]:
        iteration = i.astype(jnp.int32)
        t, slot, barrier = position(iteration)
        plgpu.barrier_wait(barrier)
        rows = {
            name: [
                _widen(mp.load(buffer.at[tile, slot, r]))
                for buffer in buffers
                for r in range(buffer.shape[2])
            ]
            for name, buffers in smem.timed.items()
            if name != "reset"
        }
        reset = None
        if "reset" in smem.timed:
            [flags] = smem.timed["reset"]
            reset = mp.by_column(flags.at[tile, slot, pl.ds(0, at.sequences)], at.row) != 0
        plgpu.commit_smem()  # all threads have read the slot
        pl.when(iteration + at.depth < at.length)(lambda: fetch(iteration + at.depth))

        def write(name: str, rows: Sequence[Row]) -> None:
            rest = iter(rows)
            for ref in targets[name]:
                for r in range(ref.shape[3]):
                    ref[group, tile, t, r] = next(rest).astype(ref.dtype)

        multiply = _multiplier(at, smem, tile, lax.rem(iteration, jnp.int32(2)))
        compute = functools.partial(
            evaluate, call.function, sizes=Sizes(at.channels, at.row), multiply=multiply
        )
        found = step(Step(rows, reset, params, compute, write), carry)
        return [plgpu.layout_cast(row, WGMMA) for row in found]

    for r, row in enumerate(lax.fori_loop(0, at.length, run_step, carry)):
        targets["carry"][0][group, tile, 0, r] = row


def _widen(row: Row) -> Row:
    """Convert a floating-point row to float32."""
    return row.astype(jnp.float32) if is_float(row) else row


def _multiplier(at: DenseLayout, smem: SharedMemory, tile: Any, parity: Any) -> Multiply:
    """Return the function that runs the products of a step.

    The factors of even and odd steps have separate buffers. A warpgroup may write those of the next
    step while another one still reads those of this step.
    """
    written: set[int] = set()

    def buffers(slot: int, part: Any) -> list[Any]:
        return [ref.at[parity, part].transpose((1, 0)) for ref in smem.operands[slot]]

    def write(term: Term) -> None:
        row = term.row
        if at.channels % TILE:  # padded channels may be NaN
            channel = mp.row_indices(at.row) + tile * TILE
            row = jnp.where(channel < at.channels, row, jnp.zeros_like(row))
        for ref, piece in zip(buffers(term.slot, tile), mp.split(row, at.pieces), strict=False):
            ref[...] = piece
        written.add(term.slot)

    def multiply(sums: list[list[Term]]) -> Sequence[jax.Array]:
        for term in itertools.chain(*sums):
            if term.slot not in written:
                write(term)
        plgpu.commit_smem()
        if at.tiles > 1:
            plgpu.barrier_arrive(smem.written)
            plgpu.barrier_wait(smem.written)

        def products(*accumulators: Any) -> list[jax.Array]:
            for accumulator, terms in zip(accumulators, sums, strict=True):
                for term, part in itertools.product(terms, range(at.tiles)):
                    index = (tile, part) if term.summed else (part, tile)
                    left = [ref.at[index] for ref in smem.matrices[term.matrix]]
                    left = left if term.summed else mp.transposed(left)
                    count = 1 if term.row.dtype == jnp.bfloat16 else at.pieces
                    for a, b in mp.factors(left, buffers(term.slot, part)[:count]):
                        plgpu.wgmma(accumulator, a, b)
            return [accumulator[...] for accumulator in accumulators]

        return pl.run_scoped(products, *(plgpu.ACC(at.row, jnp.float32) for _ in sums))

    return multiply
