"""The elementwise linear recurrence on TPU: one pass over the arrays, forward and backward.

Arrays keep the user's layout, [B, T, D]. A block has whole rows of one sequence, [block length,
columns], which are contiguous in memory if the columns are all of D. Time is an inner axis of the
grid and the state stays in VMEM, so every element is read once and written once. Inside a block the
kernel takes one row after the other. A row has enough independent elements to fill the vector unit,
and the copies hide the arithmetic. `forms` has the equations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.linear_scan import forms
from pallas_kernels.linear_scan.forms import Numbers, Pass, PassResult
from pallas_kernels.selection import select, zero_where
from pallas_kernels.vmem_rows import (
    flush_group,
    fold_rows,
    groups_in_block,
    reset_blocks,
    row_reader,
    write_row,
)


class Variant(NamedTuple):
    """Specialization of a kernel.

    Attributes:
      length: T.
      block_length: time steps per block.
      group_length: rows that are widened and narrowed together: a tile of the narrowest dtype.
      post: whether this is the `post` form.
      reverse: whether time runs from the last row to the first.
      a_in_time: whether `a` has a time axis.
      adjoint: whether the kernel computes da, with the states as an input.
      batch_inside: whether the grid runs over all sequences before the next block of time.
      interpret: whether the kernel is interpreted.
    """

    length: int
    block_length: int
    group_length: int
    post: bool
    reverse: bool
    a_in_time: bool
    adjoint: bool
    batch_inside: bool
    interpret: bool

    @property
    def time_blocks(self) -> int:
        """Number of blocks of time."""
        return -(-self.length // self.block_length)


class Refs(NamedTuple):
    """References of a kernel, one for each part of an array; () for an absent array.

    Attributes:
      a, x, h0, reset, states: blocks of the inputs; `states` are the residuals of the adjoint.
      edge: the rows of `states` next to the block.
      start: the initial state of the differentiated form.
      y, final, da: blocks of the outputs.
      state: the carried state, scratch.
      previous: states shifted to the rows of the next steps, scratch [block length + 16, columns].
      total: sum of da over time, scratch.
      wide_a, wide_x, wide_y, wide_da: rows of a group in the dtype of the state, scratch.
    """

    a: Any
    x: Any
    h0: Any
    y: Any
    final: Any
    state: Any
    reset: Any = ()
    states: Any = ()
    edge: Any = ()
    start: Any = ()
    da: Any = ()
    previous: Any = ()
    total: Any = ()
    wide_a: Any = ()
    wide_x: Any = ()
    wide_y: Any = ()
    wide_da: Any = ()

    @classmethod
    def from_list(cls, counts: dict[str, int], refs: tuple[Any, ...]) -> "Refs":
        """Group a kernel's references by field, from the number of parts of each field."""
        fields = {}
        first = 0
        for name, count in counts.items():
            fields[name] = refs[first : first + count]
            first += count
        return cls(**fields)


def block_sizes(length: int, width: int, arrays: int) -> tuple[int, int]:
    """Return the rows and columns of a block, for a number of arrays [T, D] in VMEM at once.

    A block has whole rows up to 2560 columns. Whole rows are contiguous in memory, and wide rows
    hide the latency of a step. Wider rows are split into equal parts. The number of rows is limited
    to 512, and so that two float32 buffers of every array fit 12 MiB. A kernel has 16 MiB by
    default on the smallest chip. Longer blocks are not faster: 512 rows already hide the third of
    a microsecond that a block costs.
    """
    lanes = -(-width // 128) * 128
    parts = -(-lanes // 2560)
    columns = width if parts == 1 else -(-lanes // (128 * parts)) * 128
    rows = 12 * 2**20 // (2 * 4 * arrays * min(lanes, columns + 127))
    rows = 1 << max(4, min(9, rows.bit_length() - 1))
    return min(rows, -(-length // 16) * 16), columns


def run_pass(call: Pass) -> PassResult:
    """Run a form, or its adjoint if the call has states."""
    a, x = call.a, call.x
    batch, length, width = x[0].shape
    state_dtype = call.h0[0].dtype
    parts, arrays = len(x), 3 if call.states is None else 6
    block_length, columns = call.block_sizes or block_sizes(length, width, parts * arrays)
    narrow = [t for t in (a[0].dtype, x[0].dtype, call.out_dtype) if jnp.dtype(t) != state_dtype]
    variant = Variant(
        length=length,
        block_length=block_length,
        group_length=16 if narrow else 8,
        post=call.post,
        reverse=call.reverse,
        a_in_time=a[0].shape[1] > 1 or length == 1,
        adjoint=call.states is not None,
        batch_inside=a[0].shape[:2] == (1, length)
        and isinstance(batch, int)  # under `jax.export` the batch size may be a symbol
        and batch > 1
        and parts * batch * columns * 4 <= 2**20,
        interpret=call.interpret,
    )
    grid, position = _grid(variant, batch, -(-width // columns))

    def spec(shape: tuple[int | None, ...], index: Callable[..., Any], **kw: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *ids: index(*position(*ids)), **kw)

    timed = spec((None, block_length, columns), lambda b, t, d: (b, t, d))
    state = spec((None, 1, columns), lambda b, t, d: (b, 0, d))
    shared_by_batch = a[0].shape[0] == 1
    spec_of_a = spec(
        (None, block_length if variant.a_in_time else 1, columns),
        lambda b, t, d: (0 if shared_by_batch else b, t if variant.a_in_time else 0, d),
    )
    inputs: dict[str, tuple[Any, Any]] = {"a": (a, spec_of_a), "x": (x, timed)}
    inputs["h0"] = (tuple(p[:, None] for p in call.h0), state)
    if call.reset is not None:
        in_smem = spec(
            (None, None, 1, block_length), lambda b, t, d: (b, t, 0, 0), memory_space=pltpu.SMEM
        )
        inputs["reset"] = ((reset_blocks(call.reset, block_length),), in_smem)
    outputs: dict[str, tuple[Any, Any, Any]] = {
        "y": ((batch, length, width), call.out_dtype, timed),
        "final": ((batch, 1, width), state_dtype, state),
    }
    scratch: dict[str, tuple[int, ...]] = {
        "state": (batch if variant.batch_inside else 1, 1, columns)
    }
    if call.states is not None:
        states, start = call.states
        tile = 16 if states[0].dtype != state_dtype else 8
        last = -(-length // tile) - 1
        tiles = block_length // tile
        reverse = call.reverse
        edge = spec(
            (None, tile, columns),
            lambda b, t, d: (
                b,
                jnp.clip(t * tiles - 1 if reverse else (t + 1) * tiles, 0, last),
                d,
            ),
        )
        inputs["states"], inputs["edge"] = (states, timed), (states, edge)
        inputs["start"] = (tuple(p[:, None] for p in start), state)
        scratch["previous"] = (block_length + 16, columns)
        if not variant.a_in_time:
            outputs["da"] = ((batch, 1, width), state_dtype, state)
            scratch["total"] = (1, columns)
        else:  # summed over the batch here if the grid allows it, else by `forms.adjoint`
            summed = shared_by_batch and variant.batch_inside
            shape = (1, length, width) if summed else (batch, length, width)
            dtype = state_dtype if shared_by_batch else a[0].dtype
            outputs["da"] = (shape, dtype, spec_of_a if summed else timed)
    for name, dtype in (("a", a[0].dtype), ("x", x[0].dtype), ("y", call.out_dtype)):
        if jnp.dtype(dtype) != state_dtype and (name != "a" or variant.a_in_time):
            scratch[f"wide_{name}"] = (variant.group_length, columns)
    if "da" in outputs and jnp.dtype(outputs["da"][1]) != state_dtype:
        scratch["wide_da"] = (variant.group_length, columns)

    counts = {name: len(arrays) for name, (arrays, _) in inputs.items()}
    counts |= dict.fromkeys((*outputs, *scratch), parts)
    out = pl.pallas_call(
        functools.partial(_kernel, variant, counts),
        grid=grid,
        in_specs=[spec for arrays, spec in inputs.values() for _ in arrays],
        out_specs=[spec for *_, spec in outputs.values() for _ in range(parts)],
        out_shape=[
            array_like(x[0], shape, dtype)
            for shape, dtype, _ in outputs.values()
            for _ in range(parts)
        ],
        scratch_shapes=[pltpu.VMEM(s, state_dtype) for s in scratch.values() for _ in range(parts)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "arbitrary" if variant.batch_inside else "parallel",
                "arbitrary",
            )
        ),
        interpret=call.interpret,
        name="linear_scan_adjoint" if variant.adjoint else "linear_scan",
    )(*(array for arrays, _ in inputs.values() for array in arrays))
    y, final, da = (tuple(out[i * parts : (i + 1) * parts]) for i in range(3))
    return PassResult(y, tuple(p[:, 0] for p in final), da)


scan = functools.partial(forms.scan, run_pass)
adjoint = functools.partial(forms.adjoint, run_pass)


def _grid(
    variant: Variant, batch: int, column_blocks: int
) -> tuple[tuple[int, ...], Callable[..., Any]]:
    """Return the grid, and a function from grid indices to (sequence, time block, column block)."""

    def block_at(time: Any) -> Any:
        return variant.time_blocks - 1 - time if variant.reverse else time

    if variant.batch_inside:
        grid = column_blocks, variant.time_blocks, batch
        return grid, lambda d, t, b: (b, block_at(t), d)
    return (batch, column_blocks, variant.time_blocks), lambda b, d, t: (b, block_at(t), d)


def _kernel(variant: Variant, counts: dict[str, int], *all_refs: Any) -> None:
    refs = Refs.from_list(counts, all_refs)
    ids = [pl.program_id(axis) for axis in range(3)]
    time, sequence = (ids[1], ids[2]) if variant.batch_inside else (ids[2], 0)
    block = variant.time_blocks - 1 - time if variant.reverse else time
    state_dtype = refs.state[0].dtype
    valid_rows = variant.length - block * variant.block_length  # of this and later blocks

    @pl.when(time == 0)
    def _start() -> None:
        for state, h0 in zip(refs.state, refs.h0, strict=True):
            state[sequence] = h0[...]
        for total in refs.total:
            total[...] = jnp.zeros_like(total)

    if variant.adjoint:
        _shift_states(variant, refs, block, valid_rows)
    a_rows = _group_reader(variant, refs.a, refs.wide_a) if variant.a_in_time else None
    x_rows = _group_reader(variant, refs.x, refs.wide_x)
    fixed = () if variant.a_in_time else tuple(a[...].astype(state_dtype) for a in refs.a)
    ragged = variant.length % variant.group_length != 0
    group_count, _ = groups_in_block(
        block, variant.block_length, variant.length, variant.group_length
    )

    def group(i: jax.Array, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
        index = group_count - 1 - i if variant.reverse else i
        base = pl.multiple_of(index * variant.group_length, variant.group_length)
        a_row, x_row = a_rows and a_rows(base), x_rows(base)

        def row(r: Any, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
            h, total = carry
            a, x = a_row(r) if a_row else fixed, x_row(r)
            reset = refs.reset[0][0, base + r] != 0 if refs.reset else None
            valid = base + r < valid_rows if ragged else None
            y, following = forms.advance(variant.post, h, a, x, reset)
            following = select(valid, following, h)
            _write(refs.y, refs.wide_y, base, r, y)
            if variant.adjoint:
                shift = 7 if variant.reverse else 9
                previous = tuple(s[pl.ds(base + r + shift, 1), :] for s in refs.previous)
                da = zero_where(reset, forms.multiply(y, previous))
                if variant.a_in_time:
                    first = ids[2] == 0 if variant.batch_inside else None
                    _write(refs.da, refs.wide_da, base, r, da, first)
                else:
                    total = select(valid, forms.add(total, da), total)
            return following, total

        carry = fold_rows(
            variant.group_length, row, carry, reverse=variant.reverse, unroll=not variant.interpret
        )
        for blocks, wide in ((refs.y, refs.wide_y), (refs.da, refs.wide_da)):
            for narrow_block, wide_rows in zip(blocks, wide, strict=False):
                flush_group(narrow_block, wide_rows, base, variant.group_length)
        return carry

    h = tuple(state[sequence] for state in refs.state)
    total = tuple(total[...] for total in refs.total)
    h, total = lax.fori_loop(0, group_count, group, (h, total))
    for i, value in enumerate(h):
        refs.state[i][sequence] = value
        refs.final[i][...] = value
    for i, value in enumerate(total):
        refs.total[i][...] = value
        refs.da[i][...] = value


def _shift_states(variant: Variant, refs: Refs, block: Any, valid_rows: Any) -> None:
    """Copy the states in float32 to `previous`, where each step can read the state before it.

    State t of the block goes to row 8 + t. The state before the first step, in the direction of the
    differentiated form, is the edge: the last state of the neighboring block, or the start.
    """
    for states, edge, start, previous in zip(
        refs.states, refs.edge, refs.start, refs.previous, strict=True
    ):
        previous[8 : 8 + variant.block_length, :] = states[...].astype(previous.dtype)
        if variant.reverse:  # the differentiated form runs forwards: its edge precedes the block
            before = edge[edge.shape[0] - 1 :, :].astype(previous.dtype)
            previous[7:8, :] = jnp.where(block == 0, start[...], before)
        else:
            after = edge[0:1, :].astype(previous.dtype)
            previous[8 + variant.block_length : 9 + variant.block_length, :] = after

            @pl.when(valid_rows <= variant.block_length)
            def _last(previous: Any = previous, start: Any = start) -> None:
                previous[pl.ds(8 + valid_rows, 1), :] = start[...]


def _group_reader(variant: Variant, blocks: Any, wide: Any) -> Callable[..., Any]:
    """Return a function from a group's first row to a reader of its rows, in the state's dtype."""
    wide = wide or (None,) * len(blocks)

    def reader(base: Any) -> Callable[[Any], Numbers]:
        parts = [
            row_reader(block, wide_rows, base, variant.group_length)
            for block, wide_rows in zip(blocks, wide, strict=True)
        ]
        return lambda r: tuple(part(r) for part in parts)

    return reader


def _write(blocks: Any, wide: Any, base: Any, r: Any, value: Numbers, first: Any = None) -> None:
    """Write row r of a group, or add to it where `first` is given and false."""
    wide = wide or (None,) * len(value)
    for block, wide_rows, part in zip(blocks, wide, value, strict=True):
        if first is not None:
            part = part + jnp.where(first, jnp.zeros_like(part), block[pl.ds(base + r, 1), :])
        write_row(block, wide_rows, base, r, part)
