"""Conversion of a cell's jaxpr to one channel per thread.

A cell is a function of arrays with an axis of D channels, where element i of the result depends
only on elements i of the arguments. The jaxpr is evaluated on arrays of *rows*. The channel axis is
removed, and each remaining element becomes a row of `width` channels. Data-movement ops only
permute rows, so only elementwise ops on rows remain. An op that mixes channels, or that is not
listed here, raises an error.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from pallas_kernels.jaxpr_interpreter import interpret, primitive_names

OP = "nonlinear_scan"


# Operations that Mosaic GPU lowers.
_NATIVE = primitive_names(
    "abs add and convert_element_type cos div eq erf exp exp2 ge gt le log logistic lt max min mul "
    "ne neg not or rsqrt select_n sign sin sub tanh xor"
)


def _log1p(x: jax.Array, **_: Any) -> jax.Array:
    u = 1 + x  # the sum's rounding error cancels between logarithm and divisor (Kahan)
    return jnp.where((u == 1) | (u == jnp.inf), x, jnp.log(u) * (x / (u - 1)))


def _expm1(x: jax.Array, **_: Any) -> jax.Array:
    u = jnp.exp(x)
    exact = (u - 1) * (x / jnp.log(u))
    return jnp.where(u == 1, x, jnp.where((u == jnp.inf) | (u - 1 == -1), u - 1, exact))


def _power(x: jax.Array, *, y: int) -> jax.Array:
    if y < 0:
        return 1 / _power(x, y=-y)
    return functools.reduce(lambda a, b: a * b, [x] * y) if y else jnp.ones_like(x)


# Operations that are composed of native ones.
_COMPOSED: dict[str, Callable[..., jax.Array]] = {
    "add_any": lambda x, y: x + y,
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "copy": lambda x: x,
    "expm1": _expm1,
    "integer_pow": _power,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    "one_minus_square": lambda x: (1 - x) * (1 + x),
    "square": lambda x: x * x,
}
_REDUCTIONS: dict[str, Callable[..., jax.Array]] = {
    "reduce_sum": jnp.add,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
}


_DATA_MOVEMENT = primitive_names(
    "broadcast_in_dim concatenate expand_dims reshape rev slice split squeeze stack transpose"
)


class Sizes(NamedTuple):
    """Number of channels of a program, and number of channels in a row."""

    channels: int
    width: int


class RowArray(NamedTuple):
    """An array whose elements are rows of channels.

    Attributes:
      elements: array with the axes of the original, in which the channel axis and axes of equal
        elements have size 1. An element is a row, or a number if it is equal for all channels.
      axis: the channel axis; None if all channels are equal.
    """

    elements: np.ndarray
    axis: int | None


class ArrayLayout(NamedTuple):
    """Position of the channels in an array of a cell.

    Attributes:
      shape: shape without batch and time.
      axis: the channel axis, None if the array has none.
    """

    shape: tuple[int, ...]
    axis: int | None

    @property
    def other_axes(self) -> tuple[int, ...]:
        """Shape without the channel axis."""
        return tuple(n for i, n in enumerate(self.shape) if i != self.axis)

    @property
    def size(self) -> int:
        """Number of elements per channel."""
        return math.prod(self.other_axes)

    @property
    def number_axis(self) -> tuple[int, ...]:
        """Axis of R numbers per channel in a kernel's array: (R,), or () where R is 1."""
        return () if self.size == 1 else (self.size,)

    def from_rows(self, rows: Sequence[jax.Array]) -> RowArray:
        """Build the array of rows from the rows in order."""
        elements = np.empty(self.size, object)
        for i, row in enumerate(rows):  # one by one: NumPy would convert a list of rows
            elements[i] = row
        elements = elements.reshape(self.other_axes)
        if self.axis is not None:
            elements = np.expand_dims(elements, self.axis)
        return RowArray(elements, self.axis)

    def channels_last(self, array: jax.Array, channels: int) -> jax.Array:
        """Convert [..., *shape] to [..., R, D], or to [..., D] where R is 1."""
        lead = array.shape[: array.ndim - len(self.shape)]
        if self.axis is None:
            array = jnp.broadcast_to(array[..., None], (*array.shape, channels))
        else:
            array = jnp.moveaxis(array, len(lead) + self.axis, -1)
        return array.reshape(*lead, *self.number_axis, channels)

    def original_axes(self, array: jax.Array) -> jax.Array:
        """Convert [..., (R,) D] to [..., *shape]; sum over the channels if `axis` is None.

        The sum is the transpose of the broadcast in `channels_last`, for cotangents.
        """
        lead = array.shape[: array.ndim - 1 - len(self.number_axis)]
        array = array.reshape(*lead, *self.other_axes, array.shape[-1])
        return (
            jnp.sum(array, -1)
            if self.axis is None
            else jnp.moveaxis(array, -1, len(lead) + self.axis)
        )


def array_layout(shape: Sequence[int], channels: int) -> ArrayLayout:
    """Return the layout of an array whose channels are its last axis of that size."""
    axes = [i for i, n in enumerate(shape) if n == channels]
    return ArrayLayout(tuple(shape), axes[-1] if axes else None)


def by_channel(
    function: Callable[..., jax.Array],
    layouts: Sequence[ArrayLayout],
    dtypes: Sequence[Any],
    sizes: Sizes,
) -> tuple[Callable[..., Sequence[Any]], Callable[..., Sequence[Any]]]:
    """Convert an elementwise function of arrays to a function of rows, and to its adjoint.

    Args:
      function: a function of arrays with these layouts and dtypes, whose result has channels first.
      layouts: layouts of the arguments.
      dtypes: dtypes of the arguments.
      sizes: sizes of the channel axis and of a row.

    Returns:
      (rows of all arguments, in order) -> rows of the result; and (these rows, rows of the
      result's cotangent) -> rows of the cotangents of the floating-point arguments.

    Raises:
      NotImplementedError: if the function mixes channels or has an op that kernels do not support.
    """
    width = sizes.width
    shapes = [jax.ShapeDtypeStruct(s.shape, d) for s, d in zip(layouts, dtypes, strict=True)]
    inexact = [i for i, d in enumerate(dtypes) if jnp.issubdtype(d, jnp.inexact)]

    def jvp(arrays: Sequence[Any], tangents: Sequence[Any]) -> jax.Array:
        def of_inexact(*values: jax.Array) -> jax.Array:
            filled = list(arrays)
            for i, value in zip(inexact, values, strict=True):
                filled[i] = value
            return function(*filled)

        return jax.jvp(of_inexact, [arrays[i] for i in inexact], list(tangents))[1]

    value_jaxpr = jax.make_jaxpr(function)(*shapes)
    jvp_jaxpr = jax.make_jaxpr(jvp)(shapes, [shapes[i] for i in inexact])

    def grouped(rows: Sequence[Any], layouts: Sequence[ArrayLayout]) -> list[RowArray]:
        rest = iter(rows)
        return [s.from_rows(list(itertools.islice(rest, s.size))) for s in layouts]

    def evaluate(closed: Any, args: list[RowArray]) -> list[Any]:
        [out] = _evaluate(closed, args, sizes)
        [var] = closed.jaxpr.outvars
        if out.axis not in (0, None):
            raise _unsupported("a result whose channels are not its first axis")
        elements = np.broadcast_to(out.elements, (1, *var.aval.shape[1:])).reshape(-1)
        return [_row(x, width, var.aval.dtype) for x in elements]

    def forward(*rows: Any) -> list[Any]:
        return evaluate(value_jaxpr, grouped(rows, layouts))

    argument_of_row = [i for i, s in enumerate(layouts) for _ in range(s.size)]
    primal_rows = [jax.ShapeDtypeStruct((width,), dtypes[i]) for i in argument_of_row]
    tangent_rows = [s for s, i in zip(primal_rows, argument_of_row, strict=True) if i in inexact]

    def backward(*rows: Any) -> list[Any]:
        primals, cotangents = rows[: len(primal_rows)], rows[len(primal_rows) :]

        def push(*tangents: Any) -> list[Any]:
            arrays = grouped(primals, layouts) + grouped(tangents, [layouts[i] for i in inexact])
            return evaluate(jvp_jaxpr, arrays)

        return list(jax.linear_transpose(push, *tangent_rows)(list(cotangents)))

    results = jax.eval_shape(forward, *primal_rows)
    return (
        _with_native_ops(forward, primal_rows, width),
        _with_native_ops(backward, [*primal_rows, *results], width),
    )


def _with_native_ops(function: Callable[..., Any], like: Sequence[Any], width: int) -> Any:
    """Rewrite a function of rows in native ops, because transposition introduces others."""
    closed = jax.make_jaxpr(function)(*like)

    def rewritten(*rows: Any) -> list[Any]:
        args = [ArrayLayout((width,), 0).from_rows([row]) for row in rows]
        out = _evaluate(closed, args, Sizes(width, width))
        dtypes = [v.aval.dtype for v in closed.jaxpr.outvars]
        return [_row(x.elements.item(), width, d) for x, d in zip(out, dtypes, strict=True)]

    return jaxpr_as_fun(jax.make_jaxpr(rewritten)(*like))


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{OP}: the Pallas kernel must have a cell of elementwise operations on independent "
        f"channels, got {what}; use implementation='xla' or None."
    )


def _row(element: Any, width: int, dtype: Any) -> jax.Array:
    return element if getattr(element, "ndim", 0) else jnp.full((width,), element, dtype)


def _evaluate(closed: Any, args: Sequence[RowArray], sizes: Sizes) -> list[RowArray]:
    def apply(eqn: Any, ins: Sequence[RowArray]) -> list[RowArray]:
        name = eqn.primitive.name
        if name in _NATIVE or name in _COMPOSED:
            return [_elementwise(eqn, ins, sizes.width)]
        if name in _REDUCTIONS:
            return [_reduced(eqn, ins[0], sizes.width)]
        if name in _DATA_MOVEMENT:
            return _permuted(eqn, ins, sizes.channels)
        raise _unsupported(f"the operation {name!r}")

    return interpret(closed, args, _constant, apply)


def _constant(value: Any) -> RowArray:
    if np.ndim(value):
        raise _unsupported("an array that is not an argument")
    return RowArray(np.array(value, object), None)


def _elementwise(eqn: Any, ins: Sequence[RowArray], width: int) -> RowArray:
    name, axes = eqn.primitive.name, {x.axis for x in ins} - {None}
    arrays = np.broadcast_arrays(*(x.elements for x in ins))
    out = np.empty(arrays[0].shape, object)
    axis = axes.pop() if axes else None
    if axes or (axis is not None and out.shape[axis] != 1):
        raise _unsupported(f"{name!r} of channels with other channels")
    for index in np.ndindex(out.shape):
        rows = [
            _row(x[index], width, v.aval.dtype) for x, v in zip(arrays, eqn.invars, strict=True)
        ]
        if name in _COMPOSED:
            params = {"y": eqn.params["y"]} if name == "integer_pow" else {}
            out[index] = _COMPOSED[name](*rows, **params)
        elif name == "convert_element_type":
            out[index] = lax.convert_element_type(rows[0], eqn.params["new_dtype"])
        else:
            out[index] = eqn.primitive.bind(*rows, **eqn.params)
    return RowArray(out, axis)


def _reduced(eqn: Any, x: RowArray, width: int) -> RowArray:
    """Evaluate a reduction over axes other than the channel axis."""
    aval, reduced_axes = eqn.invars[0].aval, eqn.params["axes"]
    if x.axis in reduced_axes:
        raise _unsupported(f"{eqn.primitive.name!r} over channels")
    sizes = [aval.shape[i] if i in reduced_axes else n for i, n in enumerate(x.elements.shape)]
    to_rows = np.frompyfunc(lambda e: _row(e, width, aval.dtype), 1, 1)
    rows = to_rows(np.broadcast_to(x.elements, sizes))
    combine = np.frompyfunc(_REDUCTIONS[eqn.primitive.name], 2, 1)
    for axis in sorted(reduced_axes, reverse=True):
        rows = combine.reduce(rows, axis=axis, keepdims=True)
    left = [i for i in range(len(sizes)) if i not in reduced_axes]
    return RowArray(
        rows.reshape([sizes[i] for i in left]), None if x.axis is None else left.index(x.axis)
    )


def _permuted(eqn: Any, ins: Sequence[RowArray], channels: int) -> list[RowArray]:
    """Run a data-movement op on element indices and read off the permutation."""
    elements: list[Any] = []
    codes = []
    line = np.arange(1, channels + 1)
    for x, v in zip(ins, eqn.invars, strict=True):
        first, shape = len(elements), v.aval.shape
        elements += list(x.elements.flat)
        # A code combines an element's index with its channel, 0 if it is equal for all channels.
        code = np.arange(first, len(elements)).reshape(x.elements.shape) * (channels + 1)
        if x.axis is not None:
            code = code + np.expand_dims(line, [i for i in range(len(shape)) if i != x.axis])
        codes.append(np.broadcast_to(code, shape).astype(np.int32))
    with jax.ensure_compile_time_eval():
        outs = eqn.primitive.bind(*map(jnp.asarray, codes), **eqn.params)
    permuted = []
    for out in outs if eqn.primitive.multiple_results else [outs]:
        number, channel = np.divmod(np.asarray(out), channels + 1)
        axis = None
        if channel.any():
            axes = [i for i, n in enumerate(channel.shape) if n == channels]
            rests = [[j for j in range(channel.ndim) if j != i] for i in axes]
            fits = [
                ((channel == np.expand_dims(line, rest)) | (channel == 0)).all() for rest in rests
            ]
            if not any(fits):
                raise _unsupported(f"{eqn.primitive.name!r} over channels")
            axis = axes[fits.index(True)]
        for i in range(number.ndim):
            once = number.take([0], i)
            if (number == once).all():
                number = once
            elif i == axis:
                raise _unsupported(f"{eqn.primitive.name!r} over channels")
        array = np.empty(number.shape, object)
        for index in np.ndindex(number.shape):
            array[index] = elements[number[index]]
        permuted.append(RowArray(array, axis))
    return permuted
