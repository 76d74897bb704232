"""A cell's own program, rewritten for one channel a thread.

A cell is a function of arrays with an axis of D channels, in which element i of the result depends
on element i of everything alone. Its program (jaxpr) is evaluated with arrays of *rows* in place of
arrays: the axis of channels is taken out, every element that is left is a row of `WIDTH` channels,
and what moves elements about only says which row is which. What remains are elementwise operations
on rows. An operation that would mix channels, or is not known, is refused: the answer is right or
there is none.
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

OP = "nonlinear_scan"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that exist in the kernels' language as they are.
_KNOWN = _names(
    "abs add and convert_element_type cos div eq erf exp exp2 ge gt le log logistic lt max min mul "
    "ne neg not or rsqrt select_n sign sin sub tanh xor"
)


def _log1p(x: jax.Array, **_: Any) -> jax.Array:
    u = 1 + x  # what is lost in the sum is lost in both logarithm and divisor (Kahan)
    return jnp.where((u == 1) | (u == jnp.inf), x, jnp.log(u) * (x / (u - 1)))


def _expm1(x: jax.Array, **_: Any) -> jax.Array:
    u = jnp.exp(x)
    exact = (u - 1) * (x / jnp.log(u))
    return jnp.where(u == 1, x, jnp.where((u == jnp.inf) | (u - 1 == -1), u - 1, exact))


def _power(x: jax.Array, *, y: int) -> jax.Array:
    if y < 0:
        return 1 / _power(x, y=-y)
    return functools.reduce(lambda a, b: a * b, [x] * y) if y else jnp.ones_like(x)


# And those that are made of them.
_MADE: dict[str, Callable[..., jax.Array]] = {
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
_FOLDS: dict[str, Callable[..., jax.Array]] = {
    "reduce_sum": jnp.add,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
}


_MOVES = _names(
    "broadcast_in_dim concatenate expand_dims reshape rev slice split squeeze stack transpose"
)


class Sizes(NamedTuple):
    """How many channels a program is of, and how many are in a row."""

    channels: int
    width: int


class Rows(NamedTuple):
    """An array by channel.

    Attributes:
      of: its elements along the other axes, each a row or, where it is the same for all channels,
        possibly a number; along the axis of channels, and where all elements are the same, 1 long.
      axis: of channels; None if all are alike.
    """

    of: np.ndarray
    axis: int | None


class Leaf(NamedTuple):
    """Where the channels of an array of a cell are.

    Attributes:
      shape: its shape, without batch and time.
      axis: that of channels, None if it has none.
    """

    shape: tuple[int, ...]
    axis: int | None

    @property
    def rest(self) -> tuple[int, ...]:
        """The shape without the channels."""
        return tuple(n for i, n in enumerate(self.shape) if i != self.axis)

    @property
    def size(self) -> int:
        """Numbers of a channel."""
        return math.prod(self.rest)

    def rows(self, given: Sequence[jax.Array]) -> Rows:
        """From its rows, in order."""
        made = np.empty(self.size, object)
        for i, row in enumerate(given):  # not all at once: NumPy would look into them
            made[i] = row
        made = made.reshape(self.rest)
        return Rows(made if self.axis is None else np.expand_dims(made, self.axis), self.axis)

    def take(self, array: jax.Array, channels: int) -> jax.Array:
        """[..., *shape] as [..., R, D], or [..., D] where R is 1."""
        lead = array.shape[: array.ndim - len(self.shape)]
        if self.axis is None:
            array = jnp.broadcast_to(array[..., None], (*array.shape, channels))
        else:
            array = jnp.moveaxis(array, len(lead) + self.axis, -1)
        return array.reshape(*lead, *self.middle, channels)

    def put(self, array: jax.Array) -> jax.Array:
        """The reverse; of a cotangent, which is summed over channels where they are alike."""
        lead = array.shape[: array.ndim - 1 - len(self.middle)]
        array = array.reshape(*lead, *self.rest, array.shape[-1])
        return (
            jnp.sum(array, -1)
            if self.axis is None
            else jnp.moveaxis(array, -1, len(lead) + self.axis)
        )

    @property
    def middle(self) -> tuple[int, ...]:
        """(R,), or () where R is 1."""
        return () if self.size == 1 else (self.size,)


def leaf(shape: Sequence[int], channels: int) -> Leaf:
    """An array whose channels are its last axis of that many."""
    axes = [i for i, n in enumerate(shape) if n == channels]
    return Leaf(tuple(shape), axes[-1] if axes else None)


def by_channel(
    function: Callable[..., jax.Array], leaves: Sequence[Leaf], dtypes: Sequence[Any], sizes: Sizes
) -> tuple[Callable[..., Sequence[Any]], Callable[..., Sequence[Any]]]:
    """An elementwise function of arrays as a function of rows, and its adjoint.

    Args:
      function: of arrays of the shapes of `leaves` and these dtypes; the result has channels first.
      leaves: its arguments.
      dtypes: theirs.
      sizes: of its axis of channels, and of a row.

    Returns:
      (rows of all arguments, in order) -> rows of the result; and (these rows, rows of the
      cotangent) -> those of the cotangents of the floating-point arguments.

    Raises:
      NotImplementedError: for a function that mixes channels, or holds what kernels cannot do.
    """
    width = sizes.width
    shapes = [jax.ShapeDtypeStruct(s.shape, d) for s, d in zip(leaves, dtypes, strict=True)]
    moving = [i for i, d in enumerate(dtypes) if jnp.issubdtype(d, jnp.inexact)]

    def pushed(arrays: Sequence[Any], changes: Sequence[Any]) -> jax.Array:
        def of_moving(*values: jax.Array) -> jax.Array:
            filled = list(arrays)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            return function(*filled)

        return jax.jvp(of_moving, [arrays[i] for i in moving], list(changes))[1]

    program = jax.make_jaxpr(function)(*shapes)
    push_program = jax.make_jaxpr(pushed)(shapes, [shapes[i] for i in moving])

    def grouped(rows: Sequence[Any], leaves: Sequence[Leaf]) -> list[Rows]:
        rest = iter(rows)
        return [s.rows(list(itertools.islice(rest, s.size))) for s in leaves]

    def run(closed: Any, args: list[Rows]) -> list[Any]:
        [out] = _evaluate(closed.jaxpr, closed.consts, args, sizes)
        [var] = closed.jaxpr.outvars
        if out.axis not in (0, None):
            raise _refused("a result whose channels are not its first axis")
        found = np.broadcast_to(out.of, (1, *var.aval.shape[1:])).reshape(-1)
        return [_row(x, width, var.aval.dtype) for x in found]

    def forward(*rows: Any) -> list[Any]:
        return run(program, grouped(rows, leaves))

    numbers = [i for i, s in enumerate(leaves) for _ in range(s.size)]  # by argument
    like = [jax.ShapeDtypeStruct((width,), dtypes[i]) for i in numbers]
    tangents = [s for s, i in zip(like, numbers, strict=True) if i in moving]

    def backward(*rows: Any) -> list[Any]:
        primals, cotangents = rows[: len(like)], rows[len(like) :]

        def push(*changes: Any) -> list[Any]:
            arrays = grouped(primals, leaves) + grouped(changes, [leaves[i] for i in moving])
            return run(push_program, arrays)

        return list(jax.linear_transpose(push, *tangents)(list(cotangents)))

    results = jax.eval_shape(forward, *like)
    return _only_known(forward, like, width), _only_known(backward, [*like, *results], width)


def _only_known(function: Callable[..., Any], like: Sequence[Any], width: int) -> Any:
    """A function of rows by operations that the kernels have; transposing makes others."""
    closed = jax.make_jaxpr(function)(*like)

    def again(*rows: Any) -> list[Any]:
        args = [Leaf((width,), 0).rows([row]) for row in rows]
        out = _evaluate(closed.jaxpr, closed.consts, args, Sizes(width, width))
        kinds = [v.aval.dtype for v in closed.jaxpr.outvars]
        return [_row(x.of.item(), width, kind) for x, kind in zip(out, kinds, strict=True)]

    return jaxpr_as_fun(jax.make_jaxpr(again)(*like))


def _refused(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{OP}: the Pallas kernel is for cells whose channels do not meet, elementwise operation "
        f"by elementwise operation, and this one has {what}; use implementation='xla' or None."
    )


def _row(element: Any, width: int, dtype: Any) -> jax.Array:
    return element if getattr(element, "ndim", 0) else jnp.full((width,), element, dtype)


_CALLS = _names(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call remat remat2 checkpoint"
)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Rows], sizes: Sizes) -> list[Rows]:
    known: dict[Any, Rows] = dict(zip(jaxpr.invars, args, strict=True))
    known |= {v: _alike(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(v: Any) -> Rows:
        return _alike(v.val) if hasattr(v, "val") else known[v]

    for eqn in jaxpr.eqns:
        name, ins = eqn.primitive.name, [read(v) for v in eqn.invars]
        if name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outs = _evaluate(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins, sizes
            )
        elif name in _KNOWN or name in _MADE:
            outs = [_elementwise(eqn, ins, sizes.width)]
        elif name in _FOLDS:
            outs = [_folded(eqn, ins[0], sizes.width)]
        elif name in _MOVES:
            outs = _moved(eqn, ins, sizes.channels)
        else:
            raise _refused(f"the operation {name!r}")
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _alike(value: Any) -> Rows:
    """A constant."""
    if np.ndim(value):
        raise _refused("an array that it has not been given")
    return Rows(np.array(value, object), None)


def _elementwise(eqn: Any, ins: Sequence[Rows], width: int) -> Rows:
    name, axes = eqn.primitive.name, {x.axis for x in ins} - {None}
    arrays = np.broadcast_arrays(*(x.of for x in ins))
    out = np.empty(arrays[0].shape, object)
    axis = axes.pop() if axes else None
    if axes or (axis is not None and out.shape[axis] != 1):
        raise _refused(f"{name!r} of channels with other channels")
    for where in np.ndindex(out.shape):
        rows = [
            _row(x[where], width, v.aval.dtype) for x, v in zip(arrays, eqn.invars, strict=True)
        ]
        if name in _MADE:
            params = {"y": eqn.params["y"]} if name == "integer_pow" else {}
            out[where] = _MADE[name](*rows, **params)
        elif name == "convert_element_type":
            out[where] = lax.convert_element_type(rows[0], eqn.params["new_dtype"])
        else:
            out[where] = eqn.primitive.bind(*rows, **eqn.params)
    return Rows(out, axis)


def _folded(eqn: Any, x: Rows, width: int) -> Rows:
    """A sum, or the like, over axes that are not that of channels."""
    aval, gone = eqn.invars[0].aval, eqn.params["axes"]
    if x.axis in gone:
        raise _refused(f"{eqn.primitive.name!r} over channels")
    sizes = [aval.shape[i] if i in gone else n for i, n in enumerate(x.of.shape)]
    rows = np.frompyfunc(lambda e: _row(e, width, aval.dtype), 1, 1)(np.broadcast_to(x.of, sizes))
    fold = np.frompyfunc(_FOLDS[eqn.primitive.name], 2, 1)
    for axis in sorted(gone, reverse=True):
        rows = fold.reduce(rows, axis=axis, keepdims=True)
    left = [i for i in range(len(sizes)) if i not in gone]
    return Rows(
        rows.reshape([sizes[i] for i in left]), None if x.axis is None else left.index(x.axis)
    )


def _moved(eqn: Any, ins: Sequence[Rows], channels: int) -> list[Rows]:
    """What moves elements about is done with their numbers, and it is seen where these go."""
    elements: list[Any] = []
    codes = []
    line = np.arange(1, channels + 1)
    for x, v in zip(ins, eqn.invars, strict=True):
        first, shape = len(elements), v.aval.shape
        elements += list(x.of.flat)
        # An element's number and its channel, 0 where it is the same for all.
        code = np.arange(first, len(elements)).reshape(x.of.shape) * (channels + 1)
        if x.axis is not None:
            code = code + np.expand_dims(line, [i for i in range(len(shape)) if i != x.axis])
        codes.append(np.broadcast_to(code, shape).astype(np.int32))
    with jax.ensure_compile_time_eval():
        outs = eqn.primitive.bind(*map(jnp.asarray, codes), **eqn.params)
    found = []
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
                raise _refused(f"{eqn.primitive.name!r} over channels")
            axis = axes[fits.index(True)]
        for i in range(number.ndim):
            once = number.take([0], i)
            if (number == once).all():
                number = once
            elif i == axis:
                raise _refused(f"{eqn.primitive.name!r} over channels")
        of = np.empty(number.shape, object)
        for where in np.ndindex(number.shape):
            of[where] = elements[number[where]]
        found.append(Rows(of, axis))
    return found
