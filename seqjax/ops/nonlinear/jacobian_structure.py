"""Sparsity structure of a cell's Jacobian: inference, checks and computation.

A state is [D], or [D, k]: D channels of k coupled numbers. Its Jacobian is

    "diagonal"   [D]           channel by channel, one number each
    "block"      [D, k, k]     channel by channel
    "dense"      [n, n]        n = D or D k
    "quasi"      [n]           the diagonal of a dense one: an approximation, for solvers only

The structure is inferred from the cell's program (its jaxpr), not from numbers. The analysis
tracks, for every value, the axis along which element i depends on channel i alone. Operations
outside the table of supported ones count as mixing channels, so an inferred structure is either
exact or "dense".
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.jaxpr_interpreter import interpret, primitive_names
from seqjax.ops.core import checks
from seqjax.types import PyTree

STRUCTURES = ("diagonal", "block", "dense", "quasi")
Step = Callable[[jax.Array], jax.Array]
MIXED = -1  # the mark of a value that mixes channels; None marks independence of the state

# Operations that act elementwise, on operands of one shape or scalars.
_ELEMENTWISE = primitive_names(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or "
    "pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient "
    "sub tan tanh xor"
)
_REDUCTIONS = ("reduce_", "argmax", "argmin")


def keeps_channels_apart(program: Any, state: int, axis: int = 0) -> bool:
    """Return whether channel i of the only output depends on channel i of input `state` alone.

    The channels of the output are its axis 0, those of the input are its axis `axis`.
    """
    marks: list[int | None] = [None] * len(program.jaxpr.invars)
    marks[state] = axis
    [out] = interpret(program, marks, lambda _: None, _through)
    return out in (0, None)


def _through(eqn: Any, ins: Sequence[int | None]) -> list[int | None]:
    """Return the marks of an operation's results; MIXED for unsupported operations."""
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.outvars)
    axes = {m for m in ins if m is not None}
    if not axes:
        return [None] * count
    if MIXED in axes or len(axes) > 1:
        return [MIXED] * count
    position = next(i for i, m in enumerate(ins) if m is not None)
    axis, shape = axes.pop(), eqn.invars[position].aval.shape
    alone = sum(m is not None for m in ins) == 1
    out = MIXED
    if name in _ELEMENTWISE:
        out = axis
    elif name == "broadcast_in_dim":
        target = params["broadcast_dimensions"][axis]
        out = target if params["shape"][target] == shape[axis] else MIXED
    elif name == "reshape":
        out = _same_place(shape, params["new_sizes"], axis)
    elif name == "squeeze":
        gone = params["dimensions"]
        out = MIXED if axis in gone else axis - sum(d < axis for d in gone)
    elif name == "expand_dims":
        out = axis + sum(d <= axis for d in sorted(params["dimensions"]))
    elif name == "transpose":
        out = params["permutation"].index(axis)
    elif name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        whole = params["start_indices"][axis] == 0 and params["limit_indices"][axis] == shape[axis]
        out = axis if whole and strides[axis] == 1 else MIXED
    elif name == "dynamic_slice" and position == 0 and alone:
        out = axis if params["slice_sizes"][axis] == shape[axis] else MIXED
    elif name == "concatenate":
        out = axis if params["dimension"] != axis else MIXED
    elif name == "stack":
        out = axis + (axis >= params["axis"])
    elif name == "split":
        out = axis if params["axis"] != axis else MIXED
    elif name == "rev":
        out = axis if axis not in params["dimensions"] else MIXED
    elif name == "pad" and position == 0:
        out = axis if params["padding_config"][axis] == (0, 0, 0) else MIXED
    elif name.startswith(_REDUCTIONS) and "axes" in params:
        gone = params["axes"]
        out = MIXED if axis in gone else axis - sum(d < axis for d in gone)
    elif name.startswith("cum") and "axis" in params:
        out = axis if params["axis"] != axis else MIXED
    elif name == "dot_general" and alone:
        out = _through_product(eqn, position, axis)
    return [out] * count


def _same_place(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int:
    for position, size in enumerate(new):
        if size == old[axis] and math.prod(new[:position]) == math.prod(old[:axis]):
            return position
    return MIXED


def _through_product(eqn: Any, position: int, axis: int) -> int:
    contract, batch = eqn.params["dimension_numbers"]
    if axis in contract[position]:
        return MIXED
    if axis in batch[position]:
        return batch[position].index(axis)
    taken = (*contract[position], *batch[position])
    free = axis - sum(d < axis for d in taken)
    left = eqn.invars[0].aval.ndim - len(contract[0]) - len(batch[0])
    return len(batch[0]) + free + (left if position == 1 else 0)


def jacobian(step: Step, h: jax.Array, structure: str) -> tuple[jax.Array, jax.Array]:
    """Return the next state and the Jacobian in the shapes above; dense ones as [1, n, n]."""
    out, push = jax.linearize(step, h)
    zero = jnp.zeros_like(h)  # made from h, so that directions have its varying mesh axes
    if structure == "diagonal":
        return out, push(jnp.ones_like(h))
    if structure == "block":
        units = jnp.eye(h.shape[-1], dtype=h.dtype)
        if h.shape[-1] > 8:  # the channels of a head, too many to unroll
            return out, jnp.moveaxis(jax.vmap(lambda unit: push(zero + unit))(units), 0, -1)
        columns = [push(zero + unit) for unit in units]
        return out, jnp.stack(columns, axis=-1)
    basis = jnp.eye(h.size, dtype=h.dtype).reshape(h.size, *h.shape)
    full = jax.vmap(lambda unit: push(zero + unit))(basis).reshape(h.size, h.size).T
    return out, full[None] if structure == "dense" else jnp.diagonal(full).reshape(h.shape)


def disagrees(step: Step, h: jax.Array, structure: str, direction: jax.Array) -> jax.Array:
    """Return the relative error of a declared Jacobian's product with a direction."""
    _, made = jacobian(step, h, structure)
    exact = jax.jvp(step, (h,), (direction,))[1]
    if structure == "block":
        product = jnp.einsum("dij,dj->di", made, direction)
    else:
        product = made * direction
    return jnp.max(jnp.abs(product - exact)) / jnp.maximum(jnp.max(jnp.abs(exact)), 1e-6)


def float_leaves(tree: PyTree) -> list[jax.Array]:
    """Return the floating-point arrays of a tree."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def resolve(
    op: str, cell: Callable[..., Any], params: PyTree, xs: PyTree, h0: jax.Array, declared: str
) -> tuple[str, str]:
    """Return the Jacobian's structure for the solver, and the exact structure for derivatives."""
    if declared not in ("auto", *STRUCTURES):
        raise ValueError(
            f"{op}: `jacobian` must be one of auto, {', '.join(STRUCTURES)}, got {declared!r}."
        )
    state = checks.state_dtype(h0, *float_leaves((params, xs)))

    def like(x: jax.Array, lead: int) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape[lead:], state if floating else x.dtype)

    args = (
        jax.tree.map(lambda x: like(x, 0), params),
        like(h0, 1),
        jax.tree.map(lambda x: like(x, 2), xs),
    )
    closed, shape = jax.make_jaxpr(cell, return_shape=True)(*args)
    if not hasattr(shape, "shape") or shape.shape != h0.shape[1:]:
        raise ValueError(
            f"{op}: `cell` must return one array of the shape of its state,"
            f" {list(h0.shape[1:])}, got {jax.tree.map(lambda s: list(s.shape), shape)}."
        )
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        raise ValueError(
            f"{op}: `cell` must not close over arrays made inside jit, grad or vmap; pass them in"
            " `params`."
        )
    position = len(jax.tree.leaves(args[0]))
    apart = keeps_channels_apart(closed, position)
    structured = "diagonal" if h0.ndim == 2 else "block"
    if declared == "auto":
        declared = getattr(cell, "structure", structured if apart else "dense")
    exact = structured if apart else "dense"
    if declared in ("dense", "quasi"):
        return declared, exact
    if declared != structured:
        raise ValueError(
            f"{op}: `jacobian` {declared!r} must have states"
            f" [B, {'D' if h0.ndim == 3 else 'D, k'}], got `initial_state` of"
            f" shape {list(h0.shape)}; use {structured!r} or 'dense'."
        )
    if not apart:
        _probe(op, cell, args, declared)
    return declared, declared


def _probe(op: str, cell: Callable[..., Any], args: Any, declared: str) -> None:
    """Raise if a declared structure does not hold at random points; the program did not show it."""

    def random(key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.random.normal(key, x.shape, x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    with jax.ensure_compile_time_eval():
        leaves, tree = jax.tree.flatten(args)
        for seed in range(3):
            keys = jax.random.split(jax.random.key(seed), len(leaves) + 1)
            params, h, x = jax.tree.unflatten(
                tree, [random(k, leaf) for k, leaf in zip(keys[1:], leaves, strict=True)]
            )
            direction = jax.random.normal(keys[0], h.shape, h.dtype)
            step = functools.partial(lambda p, x, h: cell(p, h, x), params, x)
            off = float(disagrees(step, h, declared, direction))
            if off > 1e-3:
                raise ValueError(
                    f"{op}: the cell's Jacobian must be {declared!r} as declared, got channels that"
                    " depend on each other; use jacobian='dense' or 'auto'."
                )
