"""Functions of rows and matrices, evaluated inside a kernel that runs several products together.

A small product has a long latency, so products that do not depend on each other run together. They
run when the first result is needed. These are the products of one row with several matrices, as for
the gates of a cell, and the terms of a sum of products, as in the cotangent of a state.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.jaxpr_interpreter import interpret
from pallas_kernels.nonlinear_scan.cell_trace import apply, as_constant, as_row, product_axes
from pallas_kernels.nonlinear_scan.row_arrays import RowArray, Sizes


class Term(NamedTuple):
    """A product of a row with a matrix.

    Attributes:
      row: the row.
      slot: an index of the row, which is equal for all products of the row.
      matrix: index of the matrix.
      summed: the axis of the matrix that is summed.
    """

    row: Any
    slot: int
    matrix: int
    summed: int


Key = tuple[int, int, Any]
Multiply = Callable[[list[list[Term]]], Sequence[jax.Array]]


class RowFunction(NamedTuple):
    """A function of matrices [D, D] and rows.

    Attributes:
      program: its jaxpr, without unused operations.
      products: for each variable that is multiplied, the (matrix, summed axis, dtype of the result)
        of its products.
      slots: for each of these variables, its slot.
      uses: number of uses of each variable.
    """

    program: Any
    products: dict[Any, list[Key]]
    slots: dict[Any, int]
    uses: Mapping[Any, int]


def row_function(
    function: Callable[..., Sequence[Any]],
    matrices: Sequence[jax.ShapeDtypeStruct],
    rows: Sequence[jax.ShapeDtypeStruct],
) -> RowFunction:
    """Trace a function of matrices and rows [sequences, D] that returns rows."""
    closed = jax.make_jaxpr(function)(*matrices, *rows)
    jaxpr = closed.jaxpr
    needed = set(filter(_is_variable, jaxpr.outvars))
    used: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            used.insert(0, eqn)
            needed.update(filter(_is_variable, eqn.invars))
    names = list(jaxpr.invars[: len(matrices)])
    products: dict[Any, dict[Key, Any]] = {}
    same: dict[Any, Any] = {}  # results of repeated products

    def renamed(variables: Sequence[Any]) -> list[Any]:
        return [same.get(v, v) if _is_variable(v) else v for v in variables]

    equations = []
    for eqn in used:
        if eqn.primitive.name == "dot_general":
            variable, key = _product(eqn, names)
            [result] = eqn.outvars
            same[result] = products.setdefault(same.get(variable, variable), {}).setdefault(
                key, result
            )
            if same[result] is not result:
                continue
        equations.append(eqn.replace(invars=renamed(eqn.invars)))
    outputs = renamed(jaxpr.outvars)
    uses = collections.Counter(v for eqn in equations for v in eqn.invars if _is_variable(v))
    uses.update(filter(_is_variable, outputs))
    return RowFunction(
        closed.replace(jaxpr=jaxpr.replace(eqns=equations, outvars=outputs)),
        {variable: list(keys) for variable, keys in products.items()},
        {variable: n for n, variable in enumerate(products)},
        uses,
    )


def _is_variable(value: Any) -> bool:
    return not hasattr(value, "val")


def _product(eqn: Any, matrices: list[Any]) -> tuple[Any, Key]:
    """Return the variable that an equation multiplies, and the key of the product."""
    which = int(eqn.invars[1] in matrices)
    _, summed = product_axes(eqn, which)
    matrix = matrices.index(eqn.invars[which])
    return eqn.invars[1 - which], (matrix, summed, eqn.outvars[0].aval.dtype)


class _Sum:
    """A sum of products and of a row, computed when it is needed."""

    def __init__(self, terms: list[Term], rest: RowArray | None = None) -> None:
        self.terms, self.rest = terms, rest
        self.value: RowArray | None = None


def evaluate(
    function: RowFunction, args: Sequence[Any], sizes: Sizes, multiply: Multiply
) -> list[Any]:
    """Evaluate a function on rows in a kernel.

    Args:
      function: the function.
      args: the rows, or numbers that are equal for all channels.
      sizes: the shape of a row in the kernel.
      multiply: (lists of terms) -> for each list, the sum of its products in float32.
    """
    matrices = list(function.program.jaxpr.invars[: -len(args)])
    products: dict[tuple[Any, Key], _Sum] = {}
    waiting: list[_Sum] = []

    def value(x: Any) -> RowArray:
        if not isinstance(x, _Sum):
            return x
        if x.value is None:
            found = multiply([s.terms for s in waiting])
            for s, row in zip(waiting, found, strict=True):
                s.value = _as_array(row if s.rest is None else row + s.rest.elements.item())
            waiting.clear()
        assert x.value is not None
        return x.value

    def start(variable: Any, x: Any) -> None:
        row = as_row(value(x).elements.item(), sizes.row, variable.aval.dtype)
        for key in function.products[variable]:
            matrix, summed, _ = key
            products[variable, key] = _Sum([Term(row, function.slots[variable], matrix, summed)])
            waiting.append(products[variable, key])

    def added(eqn: Any, ins: Sequence[Any]) -> Any:
        """Return a sum that is computed later, or None if it must be computed now."""
        later = [isinstance(x, _Sum) and x.value is None for x in ins]
        pairs = zip(later, eqn.invars, strict=True)
        if not any(later) or any(x and function.uses.get(v) != 1 for x, v in pairs):
            return None
        sums = [x for x, is_sum in zip(ins, later, strict=True) if is_sum]
        rests = [value(x) for x, is_sum in zip(ins, later, strict=True) if not is_sum]
        rests = [x for x in rests if not _is_zero(x)]
        rests += [x.rest for x in sums if x.rest is not None]
        merged = _Sum([term for x in sums for term in x.terms])
        if len(rests) == 2:
            [merged.rest] = apply(eqn, rests, sizes)
        elif rests:
            [merged.rest] = rests
        for x in sums:
            waiting.remove(x)
        waiting.append(merged)
        return merged

    def each(eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "dot_general":
            variable, key = _product(eqn, matrices)
            if (variable, key) not in products:
                start(variable, ins[1 - int(eqn.invars[1] in matrices)])
            found, dtype = products[variable, key], key[-1]
            if dtype == np.float32:
                return [found]
            return [_as_array(value(found).elements.item().astype(dtype))]
        if name in ("add", "add_any") and (found := added(eqn, ins)) is not None:
            return [found]
        return apply(eqn, [value(x) for x in ins], sizes)

    given: list[Any] = [*(None for _ in matrices), *map(_as_array, args)]
    outs = interpret(function.program, given, as_constant, each)
    dtypes = [v.aval.dtype for v in function.program.jaxpr.outvars]
    return [
        as_row(value(x).elements.item(), sizes.row, dtype)
        for x, dtype in zip(outs, dtypes, strict=True)
    ]


def _as_array(row: Any) -> RowArray:
    """Return the array [sequences, D] that consists of a row."""
    elements = np.empty((1, 1), object)
    elements[0, 0] = row
    return RowArray(elements, 1 if getattr(row, "ndim", 0) else None)


def _is_zero(x: Any) -> bool:
    return isinstance(x, RowArray) and x.axis is None and bool(x.elements.item() == 0)
