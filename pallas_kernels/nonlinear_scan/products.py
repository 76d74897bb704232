"""Products of a cell with matrices [D, D], and the factors of the matrices' cotangents.

The cotangent of a matrix is a sum of outer products over all steps and sequences. The factors of an
outer product are the other operand of the cell's product, and the cotangent of its result. A kernel
collects both factors for a block of time, and multiplies them once.

A *tap* is an array of zeros that is added to the result of a product. Its cotangent is that of the
result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.jaxpr_interpreter import bind, interpret, primitive_names
from pallas_kernels.nonlinear_scan.cell_trace import product_axes, unsupported

# Functions with custom derivatives stay whole, because taps inside would change the derivatives.
_INLINED = primitive_names("jit pjit closed_call core_call remat remat2 checkpoint")


class Product(NamedTuple):
    """A product of an array with a matrix.

    Attributes:
      matrix: index of the program's argument that is the matrix.
      summed: the axis of the matrix that is summed.
      operand_axis: the axis of the other operand that is summed, its channel axis.
      result: shape and dtype of the result.
      result_axis: the channel axis of the result.
      precision: precision of the product.
    """

    matrix: int
    summed: int
    operand_axis: int
    result: Any
    result_axis: int
    precision: Any


class _Value(NamedTuple):
    array: Any
    matrix: int | None = None


def find_products(closed: Any, candidates: Sequence[int]) -> list[Product]:
    """Return the products with matrices; `candidates` are the indices of matrix arguments."""
    found: list[Product] = []

    def apply(eqn: Any, ins: list[int | None]) -> list[None]:
        which = [i for i, argument in enumerate(ins) if argument is not None]
        if which and eqn.primitive.name == "dot_general":
            i = which[-1]
            argument = ins[i]
            assert argument is not None
            axis, summed = product_axes(eqn, i)
            out = eqn.outvars[0].aval
            found.append(
                Product(
                    argument,
                    summed,
                    axis,
                    out,
                    out.ndim - 1 if i else 0,
                    eqn.params["precision"],
                )
            )
        elif which and eqn.primitive.name.startswith("custom"):
            raise unsupported("a matrix in a function with a custom derivative")
        return [None] * len(eqn.outvars)

    numbers = [i if i in candidates else None for i in range(len(closed.jaxpr.invars))]
    interpret(closed, numbers, lambda _: None, apply, _INLINED)
    return found


def tapped(
    closed: Any, matrices: Sequence[int], leaves: Sequence[Any], taps: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Run a program with taps added to its products.

    Args:
      closed: the program.
      matrices: indices of the arguments that are matrices.
      leaves: the arguments.
      taps: one array for each product, or () for none.

    Returns:
      (outputs, the operand of each product that is not the matrix).
    """
    operands: list[Any] = []

    def apply(eqn: Any, ins: list[_Value]) -> list[_Value]:
        outs = list(bind(eqn, eqn.params)(*(v.array for v in ins)))
        which = [i for i, v in enumerate(ins) if v.matrix is not None]
        if which and eqn.primitive.name == "dot_general":
            operands.append(ins[1 - which[-1]].array)
            if taps:
                outs[0] = outs[0] + taps[len(operands) - 1]
        return [_Value(out) for out in outs]

    values = [_Value(x, i if i in matrices else None) for i, x in enumerate(leaves)]
    outs = interpret(closed, values, _Value, apply, _INLINED)
    return [v.array for v in outs], operands
