"""Conversion of a cell's jaxpr to operations on rows of channels.

A cell is a function of arrays with an axis of D channels. The jaxpr is evaluated on arrays of
*rows*. The channel axis is removed, and each remaining element becomes a row of channels. A row of
an elementwise cell on GPU is [128], because a thread has one channel. Other rows are
[sequences, D]. Data-movement ops only permute rows. The remaining ops are elementwise ops on rows,
and products of a row with a matrix [D, D]. Any other op that mixes channels, or that is not listed
here, raises an error.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from pallas_kernels.jaxpr_interpreter import interpret, primitive_names
from pallas_kernels.nonlinear_scan.row_arrays import (
    ArrayLayout,
    Matrix,
    MatrixLayout,
    RowArray,
    Sizes,
)

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


def by_channel(
    function: Callable[..., jax.Array],
    layouts: Sequence[ArrayLayout | MatrixLayout],
    dtypes: Sequence[Any],
    sizes: Sizes,
) -> tuple[Callable[..., Sequence[Any]], Callable[..., Sequence[Any]]]:
    """Convert a function of arrays to a function of rows, and to its adjoint.

    Args:
      function: a function of arrays with these layouts and dtypes, whose result has channels first.
      layouts: layouts of the arguments.
      dtypes: dtypes of the arguments.
      sizes: the number of channels and the shape of a row.

    Returns:
      (rows of all arguments, in order) -> rows of the result; and (these rows, rows of the
      result's cotangent) -> rows of the cotangents of the floating-point arguments, without those
      of matrices.

    Raises:
      NotImplementedError: if the function mixes channels or has an op that kernels do not support.
    """
    shapes = [jax.ShapeDtypeStruct(s.shape, d) for s, d in zip(layouts, dtypes, strict=True)]
    inexact = [
        i
        for i, (s, d) in enumerate(zip(layouts, dtypes, strict=True))
        if jnp.issubdtype(d, jnp.inexact) and isinstance(s, ArrayLayout)
    ]

    def jvp(arrays: Sequence[Any], tangents: Sequence[Any]) -> jax.Array:
        def of_inexact(*values: jax.Array) -> jax.Array:
            filled = list(arrays)
            for i, value in zip(inexact, values, strict=True):
                filled[i] = value
            return function(*filled)

        return jax.jvp(of_inexact, [arrays[i] for i in inexact], list(tangents))[1]

    jvp_jaxpr = jax.make_jaxpr(jvp)(shapes, [shapes[i] for i in inexact])
    forward = by_rows(function, layouts, dtypes, sizes)
    primal_rows = [
        jax.ShapeDtypeStruct(sizes.row if isinstance(s, ArrayLayout) else s.shape, d)
        for s, d in zip(layouts, dtypes, strict=True)
        for _ in range(s.size)
    ]
    tangent_rows = [
        jax.ShapeDtypeStruct(sizes.row, dtypes[i]) for i in inexact for _ in range(layouts[i].size)
    ]

    def backward(*rows: Any) -> list[Any]:
        primals, cotangents = rows[: len(primal_rows)], rows[len(primal_rows) :]

        def push(*tangents: Any) -> list[Any]:
            moving = _grouped(tangents, [layouts[i] for i in inexact])
            return _result_rows(jvp_jaxpr, [*_grouped(primals, layouts), *moving], sizes, [0])

        return list(jax.linear_transpose(push, *tangent_rows)(list(cotangents)))

    if len(sizes.row) > 1:  # Mosaic for TPU lowers the ops that a transposition introduces
        return forward, backward
    results = jax.eval_shape(forward, *primal_rows)
    return (
        _with_native_ops(forward, primal_rows, sizes.row),
        _with_native_ops(backward, [*primal_rows, *results], sizes.row),
    )


def by_rows(
    function: Callable[..., Any],
    layouts: Sequence[ArrayLayout | MatrixLayout],
    dtypes: Sequence[Any],
    sizes: Sizes,
    axes: Sequence[int] = (0,),
) -> Callable[..., list[Any]]:
    """Convert a function of arrays to one of rows; `axes` are the channel axes of the results."""
    shapes = [jax.ShapeDtypeStruct(s.shape, d) for s, d in zip(layouts, dtypes, strict=True)]
    jaxpr = jax.make_jaxpr(function)(*shapes)
    return lambda *rows: _result_rows(jaxpr, _grouped(rows, layouts), sizes, axes)


def _grouped(rows: Sequence[Any], layouts: Sequence[ArrayLayout | MatrixLayout]) -> list[Any]:
    rest = iter(rows)
    return [s.from_rows(list(itertools.islice(rest, s.size))) for s in layouts]


def _result_rows(closed: Any, args: list[Any], sizes: Sizes, axes: Sequence[int]) -> list[Any]:
    rows: list[Any] = []
    outs = _evaluate(closed, args, sizes)
    for out, var, axis in zip(outs, closed.jaxpr.outvars, axes, strict=True):
        if isinstance(out, Matrix) or out.axis not in (axis, None):
            raise unsupported("a result whose channels are not its first axis")
        shape = [1 if i == axis else n for i, n in enumerate(var.aval.shape)]
        elements = np.broadcast_to(out.elements, shape).reshape(-1)
        rows += [as_row(x, sizes.row, var.aval.dtype) for x in elements]
    return rows


def _with_native_ops(
    function: Callable[..., Any], like: Sequence[Any], row: tuple[int, ...]
) -> Any:
    """Rewrite a function of rows in native ops, because transposition introduces others."""
    closed = jax.make_jaxpr(function)(*like)

    def rewritten(*rows: Any) -> list[Any]:
        args = [ArrayLayout(row, 0).from_rows([x]) for x in rows]
        out = _evaluate(closed, args, Sizes(row[0], row))
        dtypes = [v.aval.dtype for v in closed.jaxpr.outvars]
        return [as_row(x.elements.item(), row, d) for x, d in zip(out, dtypes, strict=True)]

    return jaxpr_as_fun(jax.make_jaxpr(rewritten)(*like))


def unsupported(what: str) -> NotImplementedError:
    """Return the error for a cell that contains `what`, which the kernels do not support."""
    return NotImplementedError(
        f"{OP}: the Pallas kernel must have a cell of elementwise operations on independent "
        f"channels and of products with matrices, got {what}; use implementation='xla' or None."
    )


def as_row(element: Any, row: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return an element as a row: an element may be a number that is equal for all channels."""
    return element if getattr(element, "ndim", 0) else jnp.full(row, element, dtype)


def _evaluate(closed: Any, args: Sequence[Any], sizes: Sizes) -> list[Any]:
    return interpret(closed, args, as_constant, functools.partial(apply, sizes=sizes))


def apply(eqn: Any, ins: Sequence[Any], sizes: Sizes) -> list[RowArray]:
    """Compute an equation on arrays of rows and matrices.

    Raises:
      NotImplementedError: if kernels do not support the operation.
    """
    name = eqn.primitive.name
    matrices = sum(isinstance(x, Matrix) for x in ins)
    if name == "dot_general" and matrices == 1:
        return [_product(eqn, ins, sizes)]
    if name == "dot_general":
        raise unsupported("a product with another factor than a matrix [D, D] of `params`")
    if matrices:
        raise unsupported(f"{name!r} of a matrix")
    if name in _NATIVE or name in _COMPOSED:
        return [_elementwise(eqn, ins, sizes.row)]
    if name in _REDUCTIONS:
        return [_reduced(eqn, ins[0], sizes.row)]
    if name in _DATA_MOVEMENT:
        return _permuted(eqn, ins, sizes.channels)
    raise unsupported(f"the operation {name!r}")


def as_constant(value: Any) -> RowArray:
    """Return a number as an array of rows."""
    if np.ndim(value):
        raise unsupported("an array that is not an argument")
    return RowArray(np.array(value, object), None)


def product_axes(eqn: Any, matrix: int) -> tuple[int, int]:
    """Return the axes that a product with a matrix sums over.

    Args:
      eqn: the equation of the product.
      matrix: index of the operand that is the matrix.

    Returns:
      (axis of the other operand, axis of the matrix).

    Raises:
      NotImplementedError: if the product sums over several axes, or has batch axes.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    if any(batch) or any(len(axes) != 1 for axes in contracted):
        raise unsupported("a product over several axes, or with a matrix for each channel")
    return contracted[1 - matrix][0], contracted[matrix][0]


def _product(eqn: Any, ins: Sequence[Any], sizes: Sizes) -> RowArray:
    """Multiply all rows of an array with a matrix."""
    which = int(isinstance(ins[1], Matrix))
    matrix, x = ins[which].array, ins[1 - which]
    axis, summed = product_axes(eqn, which)
    if x.axis not in (axis, None):
        raise unsupported("a product over another axis than the channels")
    shape = [1 if i == axis else n for i, n in enumerate(eqn.invars[1 - which].aval.shape)]
    aval = eqn.invars[1 - which].aval

    def multiply(element: Any) -> jax.Array:
        return lax.dot_general(
            as_row(element, sizes.row, aval.dtype),
            matrix,
            (((1,), (summed,)), ((), ())),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.outvars[0].aval.dtype,
        )

    elements = np.squeeze(np.broadcast_to(x.elements, shape), axis)
    out = np.empty(elements.shape, object)
    for index in np.ndindex(out.shape):
        out[index] = multiply(elements[index])
    # The result of a product has the free axes of its first operand, then those of its second.
    at = out.ndim if which else 0
    return RowArray(np.expand_dims(out, at), at)


def _elementwise(eqn: Any, ins: Sequence[RowArray], row: tuple[int, ...]) -> RowArray:
    name, axes = eqn.primitive.name, {x.axis for x in ins} - {None}
    arrays = np.broadcast_arrays(*(x.elements for x in ins))
    out = np.empty(arrays[0].shape, object)
    axis = axes.pop() if axes else None
    if axes or (axis is not None and out.shape[axis] != 1):
        raise unsupported(f"{name!r} of channels with other channels")
    for index in np.ndindex(out.shape):
        rows = [
            as_row(x[index], row, v.aval.dtype) for x, v in zip(arrays, eqn.invars, strict=True)
        ]
        if name in _COMPOSED:
            params = {"y": eqn.params["y"]} if name == "integer_pow" else {}
            out[index] = _COMPOSED[name](*rows, **params)
        elif name == "convert_element_type":
            out[index] = lax.convert_element_type(rows[0], eqn.params["new_dtype"])
        else:
            out[index] = eqn.primitive.bind(*rows, **eqn.params)
    return RowArray(out, axis)


def _reduced(eqn: Any, x: RowArray, row: tuple[int, ...]) -> RowArray:
    """Evaluate a reduction over axes other than the channel axis."""
    aval, reduced_axes = eqn.invars[0].aval, eqn.params["axes"]
    if x.axis in reduced_axes:
        raise unsupported(f"{eqn.primitive.name!r} over channels")
    sizes = [aval.shape[i] if i in reduced_axes else n for i, n in enumerate(x.elements.shape)]
    to_rows = np.frompyfunc(lambda e: as_row(e, row, aval.dtype), 1, 1)
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
                raise unsupported(f"{eqn.primitive.name!r} over channels")
            axis = axes[fits.index(True)]
        for i in range(number.ndim):
            once = number.take([0], i)
            if (number == once).all():
                number = once
            elif i == axis:
                raise unsupported(f"{eqn.primitive.name!r} over channels")
        array = np.empty(number.shape, object)
        for index in np.ndindex(number.shape):
            array[index] = elements[number[index]]
        permuted.append(RowArray(array, axis))
    return permuted
