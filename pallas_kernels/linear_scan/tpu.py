"""The elementwise linear recurrence on TPU: one pass over the arrays, forward and backward.

The arrays come as the user has them, [B, T, D], and are read in blocks of whole rows: [Tb, Db] of
one sequence, which lie in one piece of memory if Db is D. Time is an inner axis of the grid and
the state stays in VMEM, so every element is read once and written once. Inside a block the rows
are taken one after the other; a row is wide enough to be independent work for a step, and all of
it hides behind the copies from and to memory.

What is computed is in `forms`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.linear_scan import forms
from pallas_kernels.linear_scan.forms import Numbers
from pallas_kernels.vmem_rows import close, each, groups, put, scalars, take


class Plan(NamedTuple):
    """What a kernel is specialised to.

    Attributes:
      length: T.
      rows: of time in a block.
      group: rows that are widened and narrowed together: a tile of the narrowest dtype.
      post: the form.
      reverse: whether time runs from the last row to the first.
      a_in_time: whether `a` has rows, or is the same at all times.
      resets: whether there are any.
      adjoint: whether da is wanted; the states are then an input.
      batch_inside: whether the grid takes all sequences at a time block, and then the next.
      interpret: whether it runs without a TPU.
    """

    length: int
    rows: int
    group: int
    post: bool
    reverse: bool
    a_in_time: bool
    resets: bool
    adjoint: bool
    batch_inside: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.length // self.rows)


def block_sizes(length: int, width: int, arrays: int) -> tuple[int, int]:
    """Rows and columns of a block, for so many arrays [T, D] that pass through VMEM at once.

    Whole rows up to 2560 columns: they are contiguous in memory, and wide rows keep the unit busy
    while a step waits for the one before. Wider rows are cut in equal parts. As many rows as two
    float32 buffers of every array leave within 12 MiB (a kernel has 16 by default on the smallest
    chip), at most 512: the third of a microsecond that a block costs is hidden long before.
    """
    lanes = -(-width // 128) * 128
    parts = -(-lanes // 2560)
    columns = width if parts == 1 else -(-lanes // (128 * parts)) * 128
    rows = 12 * 2**20 // (2 * 4 * arrays * min(lanes, columns + 127))
    rows = 1 << max(4, min(9, rows.bit_length() - 1))
    return min(rows, -(-length // 16) * 16), columns


def _run(
    a: Numbers,
    x: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    states: tuple[Numbers, Numbers] | None,
    post: bool,
    reverse: bool,
    out_dtype: Any,
    blocks: tuple[int, int] | None,
    interpret: bool,
) -> tuple[Numbers, Numbers, Numbers]:
    batch, length, width = x[0].shape
    wide = h0[0].dtype
    parts, arrays = len(x), 3 if states is None else 6
    rows, columns = blocks or block_sizes(length, width, parts * arrays)
    narrow = [t for t in (a[0].dtype, x[0].dtype, out_dtype) if jnp.dtype(t) != wide]
    plan = Plan(
        length=length,
        rows=rows,
        group=16 if narrow else 8,
        post=post,
        reverse=reverse,
        a_in_time=a[0].shape[1] > 1 or length == 1,
        resets=reset is not None,
        adjoint=states is not None,
        batch_inside=a[0].shape[:2] == (1, length)
        and isinstance(batch, int)  # under `jax.export` the batch size may be a symbol
        and batch > 1
        and parts * batch * columns * 4 <= 2**20,
        interpret=interpret,
    )
    grid, place = _grid(plan, batch, -(-width // columns))

    def block(shape: tuple[int | None, ...], where: Callable[..., Any], **kw: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *ids: where(*place(*ids)), **kw)

    in_time = block((None, rows, columns), lambda b, t, d: (b, t, d))
    state = block((None, 1, columns), lambda b, t, d: (b, 0, d))
    lone = a[0].shape[0] == 1
    of_a = block(
        (None, rows if plan.a_in_time else 1, columns),
        lambda b, t, d: (0 if lone else b, t if plan.a_in_time else 0, d),
    )
    values: dict[str, tuple[Any, Any]] = {"a": (a, of_a), "x": (x, in_time)}
    values["h0"] = (tuple(p[:, None] for p in h0), state)
    if reset is not None:
        spec = block((None, None, 1, rows), lambda b, t, d: (b, t, 0, 0), memory_space=pltpu.SMEM)
        values["reset"] = ((scalars(reset, rows),), spec)
    outputs: dict[str, tuple[Any, Any, Any]] = {
        "y": ((batch, length, width), out_dtype, in_time),
        "final": ((batch, 1, width), wide, state),
    }
    scratch: dict[str, tuple[int, ...]] = {"state": (batch if plan.batch_inside else 1, 1, columns)}
    if states is not None:
        tile = 16 if states[0][0].dtype != wide else 8
        last = -(-length // tile) - 1
        step = rows // tile
        edge = block(
            (None, tile, columns),
            lambda b, t, d: (b, jnp.clip(t * step - 1 if reverse else (t + 1) * step, 0, last), d),
        )
        values["states"], values["edge"] = (states[0], in_time), (states[0], edge)
        values["start"] = (tuple(p[:, None] for p in states[1]), state)
        scratch["found"] = (rows + 16, columns)
        if not plan.a_in_time:
            outputs["da"] = ((batch, 1, width), wide, state)
            scratch["total"] = (1, columns)
        else:  # summed over the batch here, or after
            summed = lone and plan.batch_inside
            shape = (1, length, width) if summed else (batch, length, width)
            outputs["da"] = (shape, wide if lone else a[0].dtype, of_a if summed else in_time)
    for name, dtype in (("a", a[0].dtype), ("x", x[0].dtype), ("y", out_dtype)):
        if jnp.dtype(dtype) != wide and (name != "a" or plan.a_in_time):
            scratch[f"wide_{name}"] = (plan.group, columns)
    if "da" in outputs and jnp.dtype(outputs["da"][1]) != wide:
        scratch["wide_da"] = (plan.group, columns)

    counts = {name: len(arrays) for name, (arrays, _) in values.items()}
    counts |= dict.fromkeys((*outputs, *scratch), parts)
    flat = [array for arrays, _ in values.values() for array in arrays]
    out = pl.pallas_call(
        functools.partial(_kernel, plan, counts),
        grid=grid,
        in_specs=[spec for arrays, spec in values.values() for _ in arrays],
        out_specs=[spec for *_, spec in outputs.values() for _ in range(parts)],
        out_shape=[
            array_like(x[0], shape, dtype)
            for shape, dtype, _ in outputs.values()
            for _ in range(parts)
        ],
        scratch_shapes=[pltpu.VMEM(s, wide) for s in scratch.values() for _ in range(parts)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_semantics(plan)),
        interpret=interpret,
        name="linear_scan_adjoint" if plan.adjoint else "linear_scan",
    )(*flat)
    y, final, da = (tuple(out[i * parts : (i + 1) * parts]) for i in range(3))
    return y, tuple(p[:, 0] for p in final), da


scan, adjoint = functools.partial(forms.scan, _run), functools.partial(forms.adjoint, _run)


def _grid(plan: Plan, batch: int, parts: int) -> tuple[tuple[int, ...], Callable[..., Any]]:
    """The grid, and from its indices (sequence, block of time, block of columns)."""

    def block(time: Any) -> Any:
        return plan.blocks - 1 - time if plan.reverse else time

    if plan.batch_inside:
        return (parts, plan.blocks, batch), lambda d, t, b: (b, block(t), d)
    return (batch, parts, plan.blocks), lambda b, d, t: (b, block(t), d)


def _semantics(plan: Plan) -> tuple[Any, ...]:
    if plan.batch_inside:
        return ("parallel", "arbitrary", "arbitrary")
    return ("parallel", "parallel", "arbitrary")


def _kernel(plan: Plan, counts: dict[str, int], *refs: Any) -> None:
    ref = forms.named(counts, refs)
    ids = [pl.program_id(axis) for axis in range(3)]
    time, place = (ids[1], ids[2]) if plan.batch_inside else (ids[2], 0)
    block = plan.blocks - 1 - time if plan.reverse else time
    wide = ref["state"][0].dtype
    valid = plan.length - block * plan.rows  # rows of this block and those after it

    @pl.when(time == 0)
    def _start() -> None:
        for state, h0 in zip(ref["state"], ref["h0"], strict=True):
            state[place] = h0[...]
        for total in ref.get("total", ()):
            total[...] = jnp.zeros_like(total)

    if plan.adjoint:
        _lay_out(plan, ref, block, valid)
    a_rows = _rows(plan, ref, "a") if plan.a_in_time else None
    x_rows = _rows(plan, ref, "x")
    fixed = () if plan.a_in_time else tuple(a[...].astype(wide) for a in ref["a"])
    ragged = plan.length % plan.group != 0
    count, _ = groups(block, plan.rows, plan.length, plan.group)

    def group(i: jax.Array, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
        at = count - 1 - i if plan.reverse else i
        base = pl.multiple_of(at * plan.group, plan.group)
        a_row, x_row = a_rows and a_rows(base), x_rows(base)

        def row(r: Any, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
            h, total = carry
            a, x = a_row(r) if a_row else fixed, x_row(r)
            cut = ref["reset"][0][0, base + r] != 0 if plan.resets else None
            inside = base + r < valid if ragged else None
            y, new = forms.step(plan.post, h, a, x, cut)
            new = forms.either(inside, new, h)
            _put(ref, "y", base, r, y)
            if plan.adjoint:
                shift = 7 if plan.reverse else 9
                found = tuple(f[pl.ds(base + r + shift, 1), :] for f in ref["found"])
                da = forms.unless(cut, forms.multiply(y, found))
                if plan.a_in_time:
                    _put(ref, "da", base, r, da, ids[2] == 0 if plan.batch_inside else None)
                else:
                    total = forms.either(inside, forms.add(total, da), total)
            return new, total

        carry = each(plan.group, row, carry, reverse=plan.reverse, unroll=not plan.interpret)
        for name in ("y", "da"):
            for block, narrowed in zip(
                ref.get(name, ()), ref.get(f"wide_{name}", ()), strict=False
            ):
                close(block, narrowed, base, plan.group)
        return carry

    h = tuple(state[place] for state in ref["state"])
    total = tuple(total[...] for total in ref.get("total", ()))
    h, total = lax.fori_loop(0, count, group, (h, total))
    for i, value in enumerate(h):
        ref["state"][i][place] = value
        ref["final"][i][...] = value
    for i, value in enumerate(total):
        ref["total"][i][...] = value
        ref["da"][i][...] = value


def _lay_out(plan: Plan, ref: Any, block: Any, valid: Any) -> None:
    """States in float32, shifted so that each step's row holds the state that it found.

    State t of the block goes to row 8 + t. What the first step found, in the direction of the
    form that is differentiated, is the edge: the neighbouring block's last state, or the start.
    """
    for states, edge, start, found in zip(
        ref["states"], ref["edge"], ref["start"], ref["found"], strict=True
    ):
        found[8 : 8 + plan.rows, :] = states[...].astype(found.dtype)
        if plan.reverse:  # the form runs forwards: the edge comes before the block
            before = edge[edge.shape[0] - 1 :, :].astype(found.dtype)
            found[7:8, :] = jnp.where(block == 0, start[...], before)
        else:
            found[8 + plan.rows : 9 + plan.rows, :] = edge[0:1, :].astype(found.dtype)

            @pl.when(valid <= plan.rows)
            def _last(found: Any = found, start: Any = start) -> None:
                found[pl.ds(8 + valid, 1), :] = start[...]


def _rows(plan: Plan, ref: Any, name: str) -> Callable[..., Any]:
    """From the first row of a group, a function of r: its row r, in the dtype of the state."""
    widened = ref.get(f"wide_{name}", (None,) * len(ref[name]))

    def of_group(base: Any) -> Callable[[Any], Numbers]:
        parts = [
            take(block, wide, base, plan.group)
            for block, wide in zip(ref[name], widened, strict=True)
        ]
        return lambda r: tuple(part(r) for part in parts)

    return of_group


def _put(ref: Any, name: str, base: Any, r: Any, value: Numbers, first: Any = None) -> None:
    """Write row r of a group; add it to what is there if that is said not to be the first."""
    widened = ref.get(f"wide_{name}", (None,) * len(value))
    for block, wide, part in zip(ref[name], widened, value, strict=True):
        if first is not None:
            part = part + jnp.where(first, jnp.zeros_like(part), block[pl.ds(base + r, 1), :])
        put(block, wide, base, r, part)
