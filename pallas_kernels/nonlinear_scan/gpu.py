"""Elementwise nonlinear cells on GPU, step by step in one pass, forward and backward.

    h_t = f(h_{t-1}, x_t)
    adjoint:  w_t = g_t + c_{t+1};   (dp_t, c_t, dx_t) = w_t^T df(p, h_{t-1}, x_t)

with g_t the cotangent of h_t, dp_t summed over time, and c_T+1 the cotangent of the final state.
Where `reset` is set h_{t-1} is zero, and so is c_t. A thread has one channel of one sequence: its k
numbers of state, its parameters and the sums of their cotangents stay in registers, whatever the
cell. The cell is the user's function itself, made into one of rows by `_cell`; its derivative is
JAX's. How the arrays come and go is in `pipeline`. States of k > 1 numbers are [B, T, k, D]
here, since whole rows of channels are copied.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from pallas_kernels.gpu import pipeline
from pallas_kernels.gpu.pipeline import Blocks, Near, Place
from pallas_kernels.gpu.tma import WIDTH, everywhere, zeros
from pallas_kernels.linear_scan.forms import either, unless
from pallas_kernels.nonlinear_scan.cell_trace import OP, Leaf, Sizes, by_channel, leaf
from pallas_kernels.vmem_rows import each, groups

Cell = Callable[[Any, jax.Array, Any], jax.Array]
Row = jax.Array
DTYPES = ("float32", "bfloat16", "int32")


class Program(NamedTuple):
    """A cell on rows, and the arrays of a call as the kernels take them.

    Attributes:
      forward: (rows of parameters, state and input) -> rows of the next state.
      backward: (these and the rows of its cotangent) -> those of their cotangents; there are none
        of integers.
      state: the leaf of it.
      params: leaves of the arrays that the cell closes over and of its parameters.
      xs: leaves of the inputs.
      closed: how many of `params` are closed over.
      rows: the arrays of `params` and `xs`, [1, (R,) D] and [B, T, (R,) D].
    """

    forward: Callable[..., Sequence[Row]]
    backward: Callable[..., Sequence[Row]]
    state: Leaf
    params: list[Leaf]
    xs: list[Leaf]
    closed: int
    rows: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


class At(NamedTuple):
    """A step: where it is, whether it is cut off from what came before, whether it is one."""

    block: Any
    slot: Any
    place: Any
    t: Any
    cut: Any
    inside: Any


def _program(cell: Cell, params: Any, xs: Any, h0: jax.Array) -> Program:
    wide, channels = h0.dtype, h0.shape[1]
    given, inputs = jax.tree.leaves(params), jax.tree.leaves(xs)

    def like(x: jax.Array, lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[lead:], wide if _moves(x) else x.dtype)

    closed = jax.make_jaxpr(cell)(
        jax.tree.map(lambda x: like(x, 0), params),
        like(h0, 1),
        jax.tree.map(lambda x: like(x, 2), xs),
    )
    held = [jnp.asarray(c) for c in closed.consts]
    arrays = [*held, *given]

    def flat(*leaves: jax.Array) -> jax.Array:
        with_held = ClosedJaxpr(closed.jaxpr, leaves[: len(held)])
        return jaxpr_as_fun(with_held)(*leaves[len(held) :])[0]

    of_params = [leaf(x.shape, channels) for x in arrays]
    of_xs = [leaf(x.shape[2:], channels) for x in inputs]
    state = Leaf(h0.shape[1:], 0)
    for x, found in zip(inputs, of_xs, strict=True):
        if found.axis is None:
            raise NotImplementedError(
                f"{OP}: the GPU kernel takes `xs` with an axis of D={channels} channels, got "
                f"{list(x.shape)}; broadcast it, or use implementation='xla' or None."
            )
    for x in (*arrays, *inputs):
        if x.dtype not in DTYPES:
            raise NotImplementedError(
                f"{OP}: the GPU kernel takes {', '.join(DTYPES)}, got {x.dtype}; use "
                "implementation='xla' or None."
            )
    forward, backward = by_channel(
        flat,
        [*of_params, state, *of_xs],
        [like(x, 0).dtype for x in (*arrays, h0, *inputs)],
        Sizes(channels, WIDTH),
    )
    rows = (
        tuple(at.take(x[None], channels) for at, x in zip(of_params, arrays, strict=True)),
        tuple(at.take(x, channels) for at, x in zip(of_xs, inputs, strict=True)),
    )
    return Program(forward, backward, state, of_params, of_xs, len(held), rows)


def _moves(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _blocks(
    fetched: pipeline.Arrays,
    made: pipeline.Shapes,
    others: Sequence[pipeline.Arrays | pipeline.Shapes],
    reverse: bool,
    interpret: bool,
) -> Blocks:
    pipeline.check_alignment(OP, fetched, made, *others)
    _, length, *_, width = fetched["xs"][0].shape
    size = pipeline.bytes_of_a_step
    rows, ahead = pipeline.in_time(OP, length, width, size(fetched), size(made), None)
    return Blocks(length, rows, min(ahead, -(-length // rows)), width, reverse, interpret)


def scan(
    cell: Cell,
    params: Any,
    xs: Any,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    keep: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """All states, one after the other.

    Args:
      cell: f(params, h, x) -> h of one sequence, elementwise over channels; hashable or not.
      params: pytree of arrays, each with an axis of D channels (the last of that length) or alike
        for all.
      xs: pytree of [B, T, ...] arrays with an axis of D channels.
      h0: [B, D] or [B, D, k], float32.
      reset: [B, T] bool or None.
      out_dtype: of the states.
      keep: return them for `adjoint` as well.
      interpret: run without the hardware, slowly.

    Returns:
      (states [B, T, D] or [B, T, D, k]; the final one in the dtype of h0; states for `adjoint` in
      that dtype, [B, T, D] or [B, T, k, D], or None).

    Raises:
      NotImplementedError: for what the kernel cannot do.
    """
    program, wide = _program(cell, params, xs, h0), h0.dtype
    batch, length = jax.tree.leaves(xs)[0].shape[:2]
    middle, width = program.state.middle, h0.shape[1]

    def like(*shape: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct]:
        return (jax.ShapeDtypeStruct((batch, *shape, *middle, width), dtype),)

    fetched = {"xs": program.rows[1]}
    begun = {"params": program.rows[0], "h0": (program.state.take(h0, width),)}
    made, ends = {"y": like(length, dtype=out_dtype)}, {"final": like(dtype=wide)}
    if keep and jnp.dtype(out_dtype) != wide:
        made["states"] = like(length, dtype=wide)
    plan = _blocks(fetched, made, (begun, ends), False, interpret)

    def start(near: Near) -> tuple[Any, Any]:
        return _all_rows(near.begun["params"], wide), _all_rows(near.begun["h0"], wide)

    def step(near: Near, fixed: Any, at: At, h: Sequence[Row]) -> Sequence[Row]:
        found = unless(at.cut, tuple(h))
        new = program.forward(*fixed, *found, *_all_rows(near.fetched["xs"], wide, at.slot, at.t))
        for refs in near.made.values():
            _put(refs, at, new)
        return tuple(map(pipeline.as_read, either(at.inside, tuple(new), tuple(h))))

    found = pipeline.call(
        OP,
        plan,
        pipeline.Pass(
            start,
            functools.partial(_through, plan, step),
            lambda h: {"final": (_together(h),)},
        ),
        fetched=fetched,
        begun=begun,
        made=made,
        ends=ends,
        reset=reset,
    )
    y, final = (program.state.put(found[name][0]) for name in ("y", "final"))
    return y, final, found.get("states", found["y"])[0] if keep else None


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
    """The cotangents of the floating-point leaves of `params` and `xs`, and of h0.

    Args:
      cell, params, xs, h0, reset, interpret: as for `scan`.
      states: as `scan` keeps them.
      d_states: cotangents of its states [B, T, D] or [B, T, D, k].
      d_final: of its final state.
    """
    program, wide = _program(cell, params, xs, h0), h0.dtype
    (batch, width), state = h0.shape[:2], program.state
    fetched = {
        "xs": program.rows[1],
        "states": (states,),
        "ct": (state.take(d_states, width),),
    }
    begun = {
        "params": program.rows[0],
        "h0": (state.take(h0, width),),
        "d_final": (state.take(d_final, width),),
    }
    moving = [i for i, x in enumerate(program.rows[0]) if _moves(x) and i >= program.closed]
    made = {
        "d_xs": tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.rows[1] if _moves(x))
    }
    ends = {
        "d_h0": (jax.ShapeDtypeStruct((batch, *state.middle, width), wide),),
        "d_params": tuple(
            jax.ShapeDtypeStruct((batch, *program.params[i].middle, width), wide) for i in moving
        ),
    }
    plan = _blocks(fetched, made, (begun, ends), True, interpret)
    # How many rows of cotangents come before those of the parameters, and are of these.
    held = sum(
        at.size
        for at, x in zip(program.params[: program.closed], program.rows[0], strict=False)
        if _moves(x)
    )
    counted = sum(program.params[i].size for i in moving)

    def start(near: Near) -> tuple[Any, Any]:
        fixed = {name: tuple(_all_rows(refs, wide)) for name, refs in near.begun.items()}
        return fixed, (fixed["d_final"], tuple(zeros(wide) for _ in range(counted)))

    def step(near: Near, fixed: Any, at: At, carry: Any) -> Any:
        carried, totals = carry
        first = either(
            everywhere(at.block == 0), fixed["h0"], _all_rows(near.fetched["edge"], wide, at.slot)
        )
        before = _all_rows(near.fetched["states"], wide, at.slot, jnp.maximum(at.t - 1, 0))
        found = unless(at.cut, either(everywhere(at.t == 0), first, before))
        weights = [
            ct + c for ct, c in zip(
                _all_rows(near.fetched["ct"], wide, at.slot, at.t), carried, strict=True
            )
        ]  # fmt: skip
        x = _all_rows(near.fetched["xs"], wide, at.slot, at.t)
        given = tuple(program.backward(*fixed["params"], *found, *x, *weights))[held:]
        d_params, rest = given[:counted], given[counted:]
        d_h, d_xs = rest[: state.size], rest[state.size :]
        _put(near.made["d_xs"], at, d_xs)
        new = either(at.inside, unless(at.cut, d_h), carried)
        sums = tuple(t + d for t, d in zip(totals, d_params, strict=True))
        sums = either(at.inside, sums, totals)
        return tuple(map(pipeline.as_read, new)), tuple(map(pipeline.as_read, sums))

    def finish(carry: Any) -> dict[str, tuple[Any, ...]]:
        d_h0, totals = carry
        rest, d_params = list(totals), []
        for i in moving:
            d_params.append(_together(rest[: program.params[i].size]))
            rest = rest[program.params[i].size :]
        return {"d_h0": (_together(d_h0),), "d_params": tuple(d_params)}

    given = pipeline.call(
        f"{OP}_adjoint",
        plan,
        pipeline.Pass(start, functools.partial(_through, plan, step), finish),
        fetched=fetched,
        begun=begun,
        made=made,
        ends=ends,
        reset=reset,
        edge="states",
    )
    d_params = [
        program.params[i].put(jnp.sum(ct, 0)).astype(program.rows[0][i].dtype)
        for i, ct in zip(moving, given["d_params"], strict=True)
    ]
    at_xs = [at for at, x in zip(program.xs, program.rows[1], strict=True) if _moves(x)]
    d_xs = [at.put(ct) for at, ct in zip(at_xs, given["d_xs"], strict=True)]
    return d_params, d_xs, state.put(given["d_h0"][0])


def _through(
    plan: Blocks,
    step: Callable[[Near, Any, At, Any], Any],
    near: Near,
    fixed: Any,
    where: Place,
    carry: Any,
) -> Any:
    """The steps of a block of time."""
    count, valid = groups(where.block, plan.rows, plan.length, plan.group)

    def group(i: Any, carry: Any) -> Any:
        base = (count - 1 - i if plan.reverse else i) * plan.group

        def row(r: Any, carry: Any) -> Any:
            t, cut = base + r, None
            if "reset" in near.fetched:
                cut = everywhere(near.fetched["reset"][0][where.slot, t] != 0)
            inside = everywhere(t < valid) if plan.length % plan.group else None
            return step(near, fixed, At(*where, t, cut, inside), carry)

        return each(plan.group, row, carry, reverse=plan.reverse, unroll=not plan.interpret)

    return lax.fori_loop(0, count, group, carry)


def _all_rows(refs: Sequence[Any], wide: Any, *where: Any) -> tuple[Row, ...]:
    """The rows of all arrays, there, floating-point ones in the dtype of the state."""
    rows = []
    for ref in refs:
        several = len(ref.shape) - len(where) == 2
        for r in range(ref.shape[-2]) if several else [...]:
            row = ref[(*where, r)]
            rows.append(row.astype(wide) if _moves(ref) else row)
    return tuple(rows)


def _put(refs: Sequence[Any], at: At, rows: Sequence[Row]) -> None:
    """Write the rows of a step to all arrays."""
    rest = iter(rows)
    for ref in refs:
        for r in range(ref.shape[2]) if len(ref.shape) == 4 else [...]:
            ref[(at.place, at.t, r)] = next(rest).astype(ref.dtype)


def _together(rows: Sequence[Row]) -> Any:
    """The rows of an array, as they are written once: one alone is no list."""
    return rows[0] if len(rows) == 1 else list(rows)
