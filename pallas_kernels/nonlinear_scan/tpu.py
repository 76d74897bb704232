"""Nonlinear cells on TPU, step by step in one pass, forward and backward.

    h_t = f(h_{t-1}, x_t)
    adjoint:  w_t = g_t + c_{t+1};   (dp_t, c_t, dx_t) = w_t^T df(p, h_{t-1}, x_t)

g_t is the cotangent of h_t, dp_t is summed over time, and c_{T+1} is the cotangent of the final
state. Where `reset` is true, h_{t-1} and c_t are zero.

The loop over time runs inside the kernel. The state, the recurrent matrices and the sums of their
cotangents stay in VMEM. Inputs and outputs are copied once, in blocks of time. A cell consists of
elementwise operations and of products with matrices [D, D], which `cell_program` converts to
operations on rows of channels. Here a row is [sequences, D], so that a product of a row runs on the
MXU. Arrays are [T, R, B, D] in memory, for R numbers per channel, so that the row of a step is
contiguous.

The backward pass collects the factors of the matrices' cotangents for a block of time. It
multiplies them once, with a sum over steps and sequences. All products have the precision that the
cell gives them, by default that of `jax.default_matmul_precision`.

The matrices of a cell may take at most `MATRIX_BYTES` = 16 MiB in float32, because VMEM holds them
with their cotangents and the blocks. Elman fits up to D = 2048, a GRU up to D = 1152, and an LSTM
or a head of sLSTM up to D = 1024. The sizes include padding of D to a multiple of 128.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.nonlinear_scan.cell_program import (
    Cell,
    CellProgram,
    Row,
    cell_program,
    is_float,
)
from pallas_kernels.nonlinear_scan.cell_trace import OP
from pallas_kernels.nonlinear_scan.tpu_blocks import Blocks, choose_blocks
from pallas_kernels.selection import zero_where

VMEM_BYTES = 64 * 2**20
MATRIX_BYTES = 16 * 2**20  # of all matrices [D, D] in float32

Refs = dict[str, list[Any]]
Entry = tuple[str, Any, Any]  # name; array, or shape and dtype; spec


def scan(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    save_states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute all states, step by step.

    Args:
      cell: f(params, h, x) -> h of one sequence: elementwise operations and products with matrices
        [D, D] of `params`; hashable or not.
      params: pytree of arrays. Each is a matrix, has an axis of D channels (the last axis of that
        length), or applies to all channels.
      xs: pytree of [B, T, ...] arrays with an axis of D channels.
      h0: [B, D] or [B, D, k], float32.
      reset: [B, T] bool or None.
      out_dtype: dtype of the states.
      save_states: whether to return the residuals of `adjoint`.
      interpret: run in interpret mode, without a TPU. This is slow.

    Returns:
      (states [B, T, D] or [B, T, D, k]; final state in the dtype of h0; residuals of `adjoint` in
      that dtype, [B, T, D] or [B, T, k, D], or None).

    Raises:
      NotImplementedError: if the kernel does not support the cell or an array.
    """
    program, at = _prepare(cell, params, xs, h0, interpret, reverse=False)
    state, k, like_x = program.state, program.state.size, program.x_arrays[0]
    first = state.channels_last(h0, at.channels)
    inputs = [*_inputs(program, at, reset), ("h0", at.time_first(first, 1), at.fixed(k))]
    shape = (at.length, k, at.padded, at.channels)
    outputs: list[Entry] = [
        ("y", array_like(like_x, shape, out_dtype), at.timed(k)),
        ("final", array_like(like_x, shape[1:], h0.dtype), at.fixed(k)),
    ]
    if save_states and jnp.dtype(out_dtype) != h0.dtype:
        outputs.append(("states", array_like(like_x, shape, h0.dtype), at.timed(k)))
    body = functools.partial(_forward, program, at)
    out = _call(OP, body, at, inputs, outputs, [("h", (k, *at.row))], h0.dtype)
    rows = {name: at.batch_first(of_name[0], state) for name, of_name in out.items()}
    saved = rows.get("states", rows["y"]) if save_states else None
    return state.original_axes(rows["y"]), state.original_axes(rows["final"]), saved


def adjoint(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    states: jax.Array,
    d_states: jax.Array,
    d_final: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Compute the cotangents of the floating-point leaves of `params` and `xs`, and of h0.

    Args:
      cell, params, xs, h0, reset, interpret: as for `scan`.
      states: residuals of `scan`.
      d_states: cotangents of its states [B, T, D] or [B, T, D, k].
      d_final: cotangent of its final state.
    """
    program, at = _prepare(cell, params, xs, h0, interpret, reverse=True)
    state, k, dtype, like_x = program.state, program.state.size, h0.dtype, program.x_arrays[0]
    first = state.channels_last(h0, at.channels)[:, None]
    before = jnp.concatenate([first, states[:, :-1]], axis=1)
    ct, last = (state.channels_last(x, at.channels) for x in (d_states, d_final))
    inputs = [
        *_inputs(program, at, reset),
        ("before", at.time_first(before, 2), at.timed(k)),
        ("ct", at.time_first(ct, 2, zero=True), at.timed(k)),
        ("d_final", at.time_first(last, 1, zero=True), at.fixed(k)),
    ]

    def like(dtype: Any, *shape: int) -> Any:
        return array_like(like_x, shape, dtype)

    whole = (at.padded, at.channels)
    moving = [(x, s) for x, s in zip(program.x_arrays, program.xs, strict=True) if is_float(x)]
    summed = [program.params[n].size for is_matrix, n in program.leaves if not is_matrix]
    square = (at.grid[0], at.channels, at.channels)
    once = pl.BlockSpec((None, *square[1:]), lambda b, i: (b, 0, 0), pipeline_mode=pl.Buffered(1))
    outputs: list[Entry] = [
        *(("d_xs", like(x.dtype, at.length, s.size, *whole), at.timed(s.size)) for x, s in moving),
        ("d_h0", like(dtype, k, *whole), at.fixed(k)),
        *(("d_params", like(dtype, size, *whole), at.fixed(size)) for size in summed),
        *(("d_matrices", like(dtype, *square), once) for _ in program.matrices),
    ]
    factor = (at.steps * at.sequences, at.channels)
    scratch = [
        ("c", (k, *at.row)),
        *(("operands", factor) for _ in range(len(set(program.slots)))),
        *(("results", factor) for _ in program.slots),
    ]
    body = functools.partial(_backward, program, at)
    out = _call(f"{OP}_adjoint", body, at, inputs, outputs, scratch, dtype)
    d_params = program.leaf_cotangents(
        [jnp.sum(ct, 0) for ct in out.get("d_matrices", ())],
        [jnp.sum(ct, 1) for ct in out.get("d_params", ())],
    )
    d_xs = [
        s.original_axes(at.batch_first(ct, s))
        for ct, (_, s) in zip(out.get("d_xs", ()), moving, strict=True)
    ]
    return d_params, d_xs, state.original_axes(at.batch_first(out["d_h0"][0], state))


def _prepare(
    cell: Cell, params: Any, xs: Any, h0: jax.Array, interpret: bool, reverse: bool
) -> tuple[CellProgram, Blocks]:
    """Return the cell as a function of rows, and the sizes of blocks."""
    batch, length = jax.tree.leaves(xs)[0].shape[:2]
    channels = h0.shape[1]
    program = cell_program(cell, params, xs, h0, (8, channels))
    size = 4 * len(program.matrices) * channels * (-(-channels // 128) * 128)
    if size > MATRIX_BYTES:
        raise NotImplementedError(
            f"{OP}: the matrices of the Pallas kernel must take at most {MATRIX_BYTES >> 20} MiB in"
            f" float32, because they stay in the memory of a TPU core, got {size / 2**20:.1f} MiB"
            f" for D={channels}; use implementation='xla' or None."
        )
    inputs, k = sum(s.size for s in program.xs), program.state.size
    # Blocks of inputs and outputs are buffered twice.
    rows = 2 * (inputs + 2 * k)
    if reverse:
        rows = 2 * (2 * inputs + 2 * k) + len(set(program.slots)) + len(program.slots)
    at = choose_blocks(length, batch, channels, rows, reverse, interpret)
    if at.sequences != 8:
        program = cell_program(cell, params, xs, h0, at.row)
    return program, at


def _inputs(program: CellProgram, at: Blocks, reset: jax.Array | None) -> list[Entry]:
    """Return the inputs of both passes. Inputs that do not change over time are buffered once."""

    def constant(x: jax.Array) -> Entry:
        zeros = (0,) * x.ndim
        spec = pl.BlockSpec(x.shape, lambda b, i: zeros, pipeline_mode=pl.Buffered(1))
        return "matrices" if x.ndim == 2 else "params", x, spec

    inputs: list[Entry] = [
        ("xs", at.time_first(x, 2), at.timed(s.size))
        for x, s in zip(program.x_arrays, program.xs, strict=True)
    ]
    inputs += [constant(x) for x in program.matrices]
    inputs += [constant(x.reshape(-1, 1, at.channels)) for x in program.param_arrays]
    if reset is not None:
        mask = at.time_first(reset[..., None].astype(jnp.float32), 2)
        inputs.append(("reset", mask, at.timed(1, width=1)))
    return inputs


def _call(
    name: str,
    body: Callable[[Refs], None],
    at: Blocks,
    inputs: list[Entry],
    outputs: list[Entry],
    scratch: list[tuple[str, tuple[int, ...]]],
    dtype: Any,
) -> dict[str, list[jax.Array]]:
    """Run a kernel on lists of references by name, and return its outputs by name."""

    def by_name(names: list[str], values: Any) -> Refs:
        found: Refs = {}
        for n, value in zip(names, values, strict=True):
            found.setdefault(n, []).append(value)
        return found

    output_names = [entry[0] for entry in outputs]
    names = [*(entry[0] for entry in inputs), *output_names, *(entry[0] for entry in scratch)]
    out = pl.pallas_call(
        lambda *refs: body(by_name(names, refs)),
        grid=at.grid,
        in_specs=[spec for *_, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[shape for _, shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for _, shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=at.interpret,
        name=name,
    )(*(array for _, array, _ in inputs))
    return by_name(output_names, out)


def _forward(program: CellProgram, at: Blocks, refs: Refs) -> None:
    [h_ref], [final] = refs["h"], refs["final"]

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        h_ref[...] = refs["h0"][0][...]

    def step(t: Any, h: tuple[Row, ...]) -> tuple[Row, ...]:
        previous = zero_where(_reset(refs, at, t), h)
        inputs = _rows(refs["xs"], h_ref.dtype, t)
        following = program.forward(*_fixed(refs, at, h_ref.dtype), *previous, *inputs)
        for ref in (*refs["y"], *refs.get("states", ())):
            for r, row in enumerate(following):
                ref[t, r] = row.astype(ref.dtype)
        return tuple(following)

    h = lax.fori_loop(0, at.valid_steps(), step, _rows([h_ref], h_ref.dtype))
    for r, row in enumerate(h):
        h_ref[r] = row
    final[...] = h_ref[...]


def _backward(program: CellProgram, at: Blocks, refs: Refs) -> None:
    [c_ref], [d_h0] = refs["c"], refs["d_h0"]
    operands, results = refs.get("operands", []), refs.get("results", [])
    sums, matrices = refs.get("d_params", []), refs.get("d_matrices", [])
    dtype, steps = c_ref.dtype, at.valid_steps()

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        c_ref[...] = refs["d_final"][0][...]
        # In the last block, the factors must be zero after the end of the sequence.
        for ref in (*sums, *matrices, *operands, *results):
            ref[...] = jnp.zeros_like(ref)

    def step(i: Any, c: tuple[Row, ...]) -> tuple[Row, ...]:
        t = steps - 1 - i
        reset = _reset(refs, at, t)
        previous = zero_where(reset, _rows(refs["before"], dtype, t))
        args = (*_fixed(refs, at, dtype), *previous, *_rows(refs["xs"], dtype, t))
        taps = [
            jnp.zeros(at.row, product.result.dtype)
            for product, tap in zip(program.products, program.taps, strict=True)
            for _ in range(tap.size)
        ]
        weights = [g + later for g, later in zip(_rows(refs["ct"], dtype, t), c, strict=True)]
        rows = iter(program.backward(*args, *taps, *weights)[program.dropped :])
        for ref in sums:
            for r in range(ref.shape[0]):
                ref[r] += next(rows)
        earlier = tuple(next(rows) for _ in c)
        for ref in refs.get("d_xs", ()):
            for r in range(ref.shape[1]):
                ref[t, r] = next(rows).astype(ref.dtype)
        at_t = pl.ds(pl.multiple_of(t * at.sequences, 8), at.sequences)
        for ref in results:
            ref[at_t, :] = next(rows).astype(ref.dtype)
        for slot, row in dict(zip(program.slots, program.operands(*args), strict=True)).items():
            operands[slot][at_t, :] = row
        return zero_where(reset, earlier)

    c = lax.fori_loop(0, steps, step, _rows([c_ref], dtype))
    for r, row in enumerate(c):
        c_ref[r] = row
    d_h0[...] = c_ref[...]
    pairs = zip(program.slots, results, strict=True)
    for product, tap in zip(program.products, program.taps, strict=True):
        for _ in range(tap.size):
            slot, result = next(pairs)
            left, right = operands[slot][...], result[...]
            if product.summed:
                left, right = right, left
            matrices[product.matrix][...] += lax.dot_general(
                left,
                right,
                (((0,), (0,)), ((), ())),
                precision=product.precision,
                preferred_element_type=dtype,
            )


def _fixed(refs: Refs, at: Blocks, dtype: Any) -> list[jax.Array]:
    """Read the matrices, and the rows of the parameters."""
    rows = [jnp.broadcast_to(row, at.row) for row in _rows(refs.get("params", []), dtype)]
    return [*(ref[...] for ref in refs.get("matrices", ())), *rows]


def _reset(refs: Refs, at: Blocks, t: Any) -> jax.Array | None:
    """Return a row that is true where the state is cleared before step t; None without resets."""
    if "reset" not in refs:
        return None
    return jnp.broadcast_to(refs["reset"][0][t, 0], at.row) != 0


def _rows(refs: list[Any], dtype: Any, *index: Any) -> tuple[Row, ...]:
    """Read the rows of all arrays [..., R, B, D] at an index, floating-point rows in a dtype."""
    rows = [ref[(*index, r)] for ref in refs for r in range(ref.shape[len(index)])]
    return tuple(row.astype(dtype) if is_float(row) else row for row in rows)
