"""Mamba's selective scan on TPU: states stay in registers, inputs and outputs pass once.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t        h [N, D]
    y_t = sum_n C_t[n] h_t[n] + D x_t

A row [1, D] of x or dt fills registers by itself, so each of the N components of the state is
such a row, and B_t[n], C_t[n] are scalars: nothing is broadcast along an axis and nothing is
summed over one. States reach main memory at the borders of blocks of time only, for the backward
pass, which computes those inside a block again and sums over D afterwards, a block at once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.selective_scan import ROWS, border_shape
from pallas_kernels.vmem_rows import close, each, groups, put, scalars, take

Scratch = list[tuple[str, tuple[int, ...], Any]]


class Plan(NamedTuple):
    """What a kernel is specialised to.

    Attributes:
      length: T.
      width: D.
      states: N.
      columns: of D in a block.
      group: rows that are widened and narrowed together.
      resets: whether there are any.
      save: whether the states at the borders are wanted.
      interpret: whether it runs without a TPU.
    """

    length: int
    width: int
    states: int
    columns: int
    group: int
    resets: bool
    save: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.length // ROWS)


def columns(width: int, states: int, registers: int) -> int:
    """Columns of a block: as many as leave N rows of them in so many registers of 1024 numbers."""
    most = max(128, registers * 1024 // states // 128 * 128)
    lanes = -(-width // 128) * 128
    parts = -(-lanes // most)
    return width if parts == 1 else -(-lanes // (128 * parts)) * 128


class _Blocks:
    """The block specs of the arrays, over a grid (B, D, T) whose time may run backwards."""

    def __init__(self, plan: Plan, backwards: bool) -> None:
        def time(t: Any) -> Any:
            return plan.blocks - 1 - t if backwards else t

        self.in_time = pl.BlockSpec((None, ROWS, plan.columns), lambda b, d, t: (b, time(t), d))
        self.scalars = pl.BlockSpec(
            (None, ROWS, plan.states), lambda b, d, t: (b, time(t), 0), memory_space=pltpu.SMEM
        )
        self.cut = pl.BlockSpec(
            (None, None, 1, ROWS), lambda b, d, t: (b, time(t), 0, 0), memory_space=pltpu.SMEM
        )
        self.weight = pl.BlockSpec((plan.states, 1, plan.columns), lambda b, d, t: (0, 0, d))
        self.skip = pl.BlockSpec((1, plan.columns), lambda b, d, t: (0, d))
        self.state = pl.BlockSpec((None, plan.states, plan.columns), lambda b, d, t: (b, 0, d))
        self.row = pl.BlockSpec((None, 1, plan.columns), lambda b, d, t: (b, 0, d))
        self.border = pl.BlockSpec(
            (None, None, plan.states, plan.columns), lambda b, d, t: (b, time(t), 0, d)
        )
        self.sums = pl.BlockSpec(
            (None, None, ROWS, plan.states), lambda b, d, t: (b, d, time(t), 0)
        )


def _call(
    body: Callable[..., None],
    plan: Plan,
    inputs: list[tuple[str, jax.Array, Any]],
    outputs: list[tuple[str, tuple[int, ...], Any, Any]],
    scratch: Scratch,
    interpret: bool,
    name: str,
) -> dict[str, jax.Array]:
    """`pallas_call` with arrays by name, x first: the body gets them so."""
    names = [entry[0] for entry in (*inputs, *outputs, *scratch)]

    def kernel(*refs: Any) -> None:
        body(plan, dict(zip(names, refs, strict=True)))

    batch, _, width = inputs[0][1].shape
    out = pl.pallas_call(
        kernel,
        grid=(batch, -(-width // plan.columns), plan.blocks),
        in_specs=[spec for _, _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[array_like(inputs[0][1], shape, dtype) for _, shape, dtype, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for _, shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=name,
    )(*(array for _, array, _ in inputs))
    return dict(zip([entry[0] for entry in outputs], out, strict=True))


def _wide_rows(plan: Plan, wide: Any, **dtypes: Any) -> Scratch:
    shape = (plan.group, plan.columns)
    return [(f"wide_{k}", shape, wide) for k, dtype in dtypes.items() if dtype != wide]


def forward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    save: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final state, and the states before each block of time if they are to be saved.

    Args:
      x: [B, T, D].
      dt: [B, T, D].
      A: [N, D] in the dtype of the state.
      B: [B, T, N], likewise.
      C: [B, T, N], likewise.
      D: [1, D], likewise.
      h0: [B, N, D], likewise.
      reset: [B, T] bool or None.
      save: whether states are wanted.
      interpret: run without a TPU, slowly.

    Returns:
      (y [B, T, D] like x, final state [B, N, D], [B, blocks, N, D] or None).
    """
    wide, (batch, length, width) = h0.dtype, x.shape
    group = 8 if x.dtype == dt.dtype == wide else 16
    states = A.shape[0]
    fits = columns(width, states, registers=32)
    plan = Plan(length, width, states, fits, group, reset is not None, save, interpret)
    at = _Blocks(plan, backwards=False)
    inputs = [("x", x, at.in_time), ("dt", dt, at.in_time), ("A", _in_rows(A), at.weight)]
    inputs += [("B", B, at.scalars), ("C", C, at.scalars), ("D", D, at.skip), ("h0", h0, at.state)]
    if reset is not None:
        inputs.append(("cut", scalars(reset, ROWS), at.cut))
    outputs = [("y", x.shape, x.dtype, at.in_time), ("final", h0.shape, wide, at.state)]
    if save:
        shape = border_shape((batch, length, width, plan.states))
        outputs.append(("borders", shape, wide, at.border))
    scratch: Scratch = [("h", (plan.states, plan.columns), wide)]
    scratch += _wide_rows(plan, wide, x=x.dtype, dt=dt.dtype, y=x.dtype)
    out = _call(_forward, plan, inputs, outputs, scratch, interpret, "selective_scan")
    return out["y"], out["final"], out.get("borders")


def _in_rows(A: jax.Array) -> jax.Array:
    """[N, 1, D], whose rows lie in one piece, times log2(e): the unit computes powers of 2."""
    return (A * math.log2(math.e))[:, None]


def _step(plan: Plan, ref: Any, h: Any, x: Any, dt: Any, row: Any) -> tuple[jax.Array, ...]:
    """The state after a step."""
    cut = ref["cut"][0, row] != 0 if plan.resets else None
    write, after = dt * x, []
    for n, old in enumerate(h):
        kept = jnp.exp2(dt * ref["A"][n]) * old
        if cut is not None:
            kept = jnp.where(cut, jnp.zeros_like(kept), kept)
        after.append(kept + ref["B"][row, n] * write)
    return tuple(after)


def _forward(plan: Plan, ref: Any) -> None:
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _start() -> None:
        ref["h"][...] = ref["h0"][...]

    if plan.save:
        ref["borders"][...] = ref["h"][...]
    count, valid = groups(block, ROWS, plan.length, plan.group)

    def group(i: jax.Array, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        base = pl.multiple_of(i * plan.group, plan.group)
        xs, dts = (take(ref[k], ref.get(f"wide_{k}"), base, plan.group) for k in ("x", "dt"))

        def row(r: Any, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x = xs(r)
            after = _step(plan, ref, h, x, dts(r), base + r)
            y = ref["D"][...] * x
            for n, state in enumerate(after):
                y = y + ref["C"][base + r, n] * state
            put(ref["y"], ref.get("wide_y"), base, r, y)
            return _inside(plan, base + r < valid, after, h)

        h = each(plan.group, row, h, reverse=False, unroll=not plan.interpret)
        close(ref["y"], ref.get("wide_y"), base, plan.group)
        return h

    h = lax.fori_loop(0, count, group, _rows_of(ref["h"], plan))
    for n, state in enumerate(h):
        ref["h"][n : n + 1, :] = state
    ref["final"][...] = ref["h"][...]


def _rows_of(ref: Any, plan: Plan) -> tuple[jax.Array, ...]:
    return tuple(ref[n : n + 1, :] for n in range(plan.states))


def _inside(plan: Plan, inside: Any, new: Any, old: Any) -> Any:
    """The new state, but for rows after the end of the sequence."""
    if plan.length % plan.group == 0:
        return new
    return tuple(jnp.where(inside, p, q) for p, q in zip(new, old, strict=True))


def backward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    reset: jax.Array | None,
    borders: jax.Array,
    dy: jax.Array,
    d_final: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """The cotangents of (x, dt, A, B, C, D, h0), those of A to D in the dtype of the state."""
    wide, (batch, length, width) = borders.dtype, x.shape
    group, states = 8 if x.dtype == dt.dtype == dy.dtype == wide else 16, A.shape[0]
    fits = columns(width, states, registers=16)
    plan = Plan(length, width, states, fits, group, reset is not None, False, interpret)
    parts = -(-width // plan.columns)
    at = _Blocks(plan, backwards=True)
    inputs = [("x", x, at.in_time), ("dt", dt, at.in_time), ("dy", dy, at.in_time)]
    inputs += [
        ("A", _in_rows(A), at.weight),
        ("B", B, at.scalars),
        ("C", C, at.scalars),
        ("D", D, at.skip),
    ]
    inputs += [("borders", borders, at.border), ("d_final", d_final, at.state)]
    if reset is not None:
        inputs.append(("cut", scalars(reset, ROWS), at.cut))
    sums = (batch, parts, length, plan.states)
    outputs = [("dx", x.shape, x.dtype, at.in_time), ("ddt", dt.shape, dt.dtype, at.in_time)]
    outputs += [("dB", sums, wide, at.sums), ("dC", sums, wide, at.sums)]
    outputs += [("dA", d_final.shape, wide, at.state), ("dh0", d_final.shape, wide, at.state)]
    outputs += [("dD", (batch, 1, width), wide, at.row)]
    scratch: Scratch = [("h", (plan.states, ROWS + 8, plan.columns), wide)]
    scratch += [("l", (plan.states, ROWS, plan.columns), wide)]
    scratch += [("carry", (plan.states, plan.columns), wide)]
    scratch += _wide_rows(plan, wide, x=x.dtype, dt=dt.dtype, dy=dy.dtype)
    scratch += _wide_rows(plan, wide, dx=x.dtype, ddt=dt.dtype)
    out = _call(_backward, plan, inputs, outputs, scratch, interpret, "selective_scan_backward")
    return (
        out["dx"],
        out["ddt"],
        out["dA"].sum(0),
        out["dB"].sum(1),
        out["dC"].sum(1),
        out["dD"].sum(0),
        out["dh0"],
    )


def _backward(plan: Plan, ref: Any) -> None:
    time = pl.program_id(2)
    block, wide = plan.blocks - 1 - time, ref["carry"].dtype
    columns_left = plan.width - pl.program_id(1) * plan.columns
    count, valid = groups(block, ROWS, plan.length, plan.group)

    @pl.when(time == 0)
    def _start() -> None:
        ref["carry"][...] = ref["d_final"][...]
        ref["dA"][...] = jnp.zeros_like(ref["dA"])
        ref["dD"][...] = jnp.zeros_like(ref["dD"])

    def again(i: jax.Array, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The states of the block: what step r found in row 7 + r, what it made in row 8 + r."""
        base = pl.multiple_of(i * plan.group, plan.group)
        xs, dts = (take(ref[k], ref.get(f"wide_{k}"), base, plan.group) for k in ("x", "dt"))

        def row(r: Any, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            h = _step(plan, ref, h, xs(r), dts(r), base + r)
            for n, state in enumerate(h):
                ref["h"][n, pl.ds(base + r + 8, 1), :] = state
            return h

        return each(plan.group, row, h, reverse=False, unroll=not plan.interpret)

    before = _rows_of(ref["borders"], plan)
    for n, state in enumerate(before):
        ref["h"][n, 7:8, :] = state
    lax.fori_loop(0, count, again, before)

    def back(i: jax.Array, carry: Any) -> Any:
        base = pl.multiple_of((count - 1 - i) * plan.group, plan.group)
        xs, dts, dys = (
            take(ref[k], ref.get(f"wide_{k}"), base, plan.group) for k in ("x", "dt", "dy")
        )

        def row(r: Any, carry: Any) -> Any:
            lam, dA, dD = carry
            at, x, dt, dy = base + r, xs(r), dts(r), dys(r)
            cut = ref["cut"][0, at] != 0 if plan.resets else None
            d_write, ddt = jnp.zeros_like(x), jnp.zeros_like(x)
            before, dA_after = [], []
            for n, old in enumerate(lam):
                weight = ref["A"][n]
                total = old + ref["C"][at, n] * dy
                ref["l"][n, pl.ds(at, 1), :] = total
                d_write = d_write + ref["B"][at, n] * total
                left = jnp.exp2(dt * weight) * total
                change = left * ref["h"][n, pl.ds(at + 7, 1), :]
                if cut is not None:
                    left, change = (jnp.where(cut, jnp.zeros_like(v), v) for v in (left, change))
                ddt = ddt + change * weight
                dA_after.append(dA[n] + change * dt)
                before.append(left)
            ddt = ddt * math.log(2) + d_write * x
            put(ref["ddt"], ref.get("wide_ddt"), base, r, ddt)
            put(ref["dx"], ref.get("wide_dx"), base, r, d_write * dt + ref["D"][...] * dy)
            new = (*before, *dA_after, dD + dy * x)
            kept = _inside(plan, at < valid, new, (*lam, *dA, dD))
            return kept[: plan.states], kept[plan.states : -1], kept[-1]

        carry = each(plan.group, row, carry, reverse=True, unroll=not plan.interpret)
        for k in ("dx", "ddt"):
            close(ref[k], ref.get(f"wide_{k}"), base, plan.group)
        return carry

    start = (_rows_of(ref["carry"], plan), _rows_of(ref["dA"], plan), ref["dD"][...])
    lam, dA, dD = lax.fori_loop(0, count, back, start)
    for n in range(plan.states):
        ref["carry"][n : n + 1, :] = lam[n]
        ref["dA"][n : n + 1, :] = dA[n]
    ref["dD"][...] = dD
    ref["dh0"][...] = ref["carry"][...]

    # What is summed over D: of all rows of a group at once, so that registers are full.
    ragged = plan.width % plan.columns != 0
    lane = lax.broadcasted_iota(jnp.int32, (plan.group, plan.columns), 1)
    place = lax.broadcasted_iota(jnp.int32, (plan.group, plan.states), 1)

    def sums(i: jax.Array, _: None) -> None:
        base = pl.multiple_of(i * plan.group, plan.group)
        rows = pl.ds(base, plan.group)
        x, dt, dy = (ref[k][rows, :].astype(wide) for k in ("x", "dt", "dy"))
        factors = {
            "dB": (ref["l"], rows, dt * x),
            "dC": (ref["h"], pl.ds(base + 8, plan.group), dy),
        }
        for name, (held, at, factor) in factors.items():
            found = jnp.zeros((plan.group, plan.states), wide)
            for n in range(plan.states):
                product = held[n, at, :] * factor
                if ragged:
                    product = jnp.where(lane < columns_left, product, jnp.zeros_like(product))
                found = jnp.where(place == n, jnp.sum(product, axis=1, keepdims=True), found)
            ref[name][rows, :] = found

    lax.fori_loop(0, count, sums, None)
