"""A cell and the arrays of a call, converted to the layout of the kernels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from pallas_kernels.jaxpr_interpreter import interpret
from pallas_kernels.nonlinear_scan.cell_trace import OP, by_channel, by_rows
from pallas_kernels.nonlinear_scan.products import Product, find_products, tapped
from pallas_kernels.nonlinear_scan.row_arrays import (
    ArrayLayout,
    MatrixLayout,
    Sizes,
    array_layout,
)

Cell = Callable[[Any, jax.Array, Any], jax.Array]
Row = jax.Array
DTYPES = ("float32", "bfloat16", "int32")


class CellProgram(NamedTuple):
    """A cell as a function of rows, and the arrays of a call in the kernels' layout.

    Attributes:
      forward: (matrices, rows of parameters, state and input) -> rows of the next state.
      operands: (the same arguments) -> rows of the operands of `products`.
      backward: (the same arguments, rows of the taps and of the state's cotangent) -> rows of the
        cotangents of the floating-point arguments and of the taps, without those of the matrices.
        See `products` for taps.
      state: layout of the state.
      params: layouts of the arrays that the cell closes over, then of its parameters, without
        matrices.
      xs: layouts of the inputs.
      closed_over: number of `params` that the cell closes over.
      param_arrays: the arrays of `params`, [1, (R,) D].
      x_arrays: the arrays of `xs`, [B, T, (R,) D].
      matrices: the matrices [D, D].
      leaves: for each floating-point leaf of the parameters, whether it is a matrix, and its index
        in `matrices` or `params`.
      products: the products with matrices. Their `matrix` is an index into `matrices`.
      taps: layouts of the taps, which are those of the results of `products`.
      slots: for each row of `operands`, an index that identical rows share.
    """

    forward: Callable[..., Sequence[Row]]
    operands: Callable[..., Sequence[Row]]
    backward: Callable[..., Sequence[Row]]
    state: ArrayLayout
    params: list[ArrayLayout]
    xs: list[ArrayLayout]
    closed_over: int
    param_arrays: tuple[jax.Array, ...]
    x_arrays: tuple[jax.Array, ...]
    matrices: tuple[jax.Array, ...]
    leaves: list[tuple[bool, int]]
    products: list[Product]
    taps: list[ArrayLayout]
    slots: list[int]

    @property
    def dropped(self) -> int:
        """Number of first rows of `backward`: cotangents of arrays that the cell closes over."""
        closed_over = zip(self.params[: self.closed_over], self.param_arrays, strict=False)
        return sum(layout.size for layout, x in closed_over if is_float(x))

    def leaf_cotangents(
        self, matrices: Sequence[jax.Array], rows: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Return the cotangents of the floating-point leaves of the parameters.

        Args:
          matrices: cotangents of `matrices`.
          rows: cotangents [R, D] of the other leaves, in the order of `leaves`.
        """
        rest, found = iter(rows), []
        for is_matrix, n in self.leaves:
            if is_matrix:
                total, array = matrices[n], self.matrices[n]
            else:
                layout, array = self.params[n], self.param_arrays[n]
                total = next(rest)
                total = layout.original_axes(total.reshape(*layout.number_axis, total.shape[-1]))
            found.append(total.astype(array.dtype))
        return found


def multiplies(cell: Cell, params: Any, xs: Any, h0: jax.Array) -> bool:
    """Return whether a cell contains products of arrays."""
    names: set[str] = set()

    def apply(eqn: Any, ins: list[None]) -> list[None]:
        names.add(eqn.primitive.name)
        return [None] * len(eqn.outvars)

    closed = jax.make_jaxpr(cell)(*_shapes(params, xs, h0))
    interpret(closed, [None] * len(closed.jaxpr.invars), lambda _: None, apply)
    return "dot_general" in names


def _shapes(params: Any, xs: Any, h0: jax.Array) -> tuple[Any, jax.ShapeDtypeStruct, Any]:
    """Return the shapes of the arguments of a cell, with floating-point arrays in h0's dtype."""

    def like(x: jax.Array, lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[lead:], widened(x, h0.dtype))

    return (
        jax.tree.map(lambda x: like(x, 0), params),
        like(h0, 1),
        jax.tree.map(lambda x: like(x, 2), xs),
    )


def widened(x: Any, state_dtype: Any) -> Any:
    """Return the dtype of an array in the cell."""
    return jnp.dtype(state_dtype) if is_float(x) else x.dtype


def is_float(x: Any) -> bool:
    """Return whether an array has a floating-point dtype, and therefore a cotangent."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def cell_program(
    cell: Cell, params: Any, xs: Any, h0: jax.Array, row: tuple[int, ...]
) -> CellProgram:
    """Convert a cell and the arrays of a call.

    Args:
      cell: f(params, h, x) -> h of one sequence.
      params: pytree of arrays.
      xs: pytree of [B, T, ...] arrays.
      h0: [B, D] or [B, D, k].
      row: the shape of a row, [width] without products or [sequences, D] with them.
        A kernel may have rows of another shape (`row_function`).

    Raises:
      NotImplementedError: if the kernel does not support the cell or an array.
    """
    channels = h0.shape[1]
    params_flat, xs_flat = jax.tree.leaves(params), jax.tree.leaves(xs)
    shapes = _shapes(params, xs, h0)
    closed = jax.make_jaxpr(cell)(*shapes)
    closed_over = [jnp.asarray(c) for c in closed.consts]
    arrays = [*closed_over, *params_flat]

    def of_arrays(consts: Sequence[jax.Array], leaves: Sequence[jax.Array]) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*leaves)

    whole = jax.make_jaxpr(of_arrays)(closed_over, jax.tree.leaves(shapes))
    square = [i for i, x in enumerate(arrays) if x.shape == (channels, channels)]
    products = find_products(whole, square) if len(row) > 1 else []
    chosen = sorted({p.matrix for p in products})
    plain = [i for i in range(len(arrays)) if i not in chosen]
    products = [p._replace(matrix=chosen.index(p.matrix)) for p in products]

    def run(leaves: Sequence[jax.Array], taps: Sequence[jax.Array]) -> tuple[Any, Any]:
        order = (*chosen, *plain)
        given = [leaves[order.index(i)] for i in range(len(arrays))]
        return tapped(whole, chosen, [*given, *leaves[len(arrays) :]], taps)

    of_params = [array_layout(arrays[i].shape, channels) for i in plain]
    of_xs = [array_layout(x.shape[2:], channels) for x in xs_flat]
    state = ArrayLayout(h0.shape[1:], 0)
    taps = [ArrayLayout(p.result.shape, p.result_axis) for p in products]
    _check(arrays, xs_flat, of_xs, channels)
    layouts: list[ArrayLayout | MatrixLayout] = [
        *(MatrixLayout(arrays[i].shape) for i in chosen),
        *of_params,
        state,
        *of_xs,
    ]
    dtypes = [widened(arrays[i], h0.dtype) for i in (*chosen, *plain)]
    dtypes += [widened(x, h0.dtype) for x in (h0, *xs_flat)]
    sizes, count = Sizes(channels, row), len(layouts)
    forward, backward = by_channel(
        lambda *leaves: run(leaves[:count], leaves[count:])[0][0],
        [*layouts, *taps],
        [*dtypes, *(p.result.dtype for p in products)],
        sizes,
    )
    if products:
        forward = by_rows(lambda *leaves: run(leaves, ())[0][0], layouts, dtypes, sizes)
    operands = by_rows(
        lambda *leaves: run(leaves, ())[1],
        layouts,
        dtypes,
        sizes,
        [p.operand_axis for p in products],
    )
    first = len(closed_over)
    return CellProgram(
        forward,
        operands,
        backward,
        state,
        of_params,
        of_xs,
        sum(i < first for i in plain),
        tuple(
            layout.channels_last(arrays[i][None], channels)
            for layout, i in zip(of_params, plain, strict=True)
        ),
        tuple(layout.channels_last(x, channels) for layout, x in zip(of_xs, xs_flat, strict=True)),
        tuple(arrays[i] for i in chosen),
        [
            (i in chosen, (chosen if i in chosen else plain).index(i))
            for i in range(first, len(arrays))
            if is_float(arrays[i])
        ],
        products,
        taps,
        _slots(operands, layouts, dtypes, row),
    )


def _slots(
    operands: Callable[..., Sequence[Row]],
    layouts: Sequence[ArrayLayout | MatrixLayout],
    dtypes: Sequence[Any],
    row: tuple[int, ...],
) -> list[int]:
    """Return, for each row that `operands` returns, an index that identical rows share."""
    found: dict[int, int] = {}
    slots: list[int] = []

    def run(*rows: Row) -> Sequence[Row]:
        out = operands(*rows)
        slots.extend(found.setdefault(id(x), len(found)) for x in out)
        return out

    jax.eval_shape(
        run,
        *(
            jax.ShapeDtypeStruct(s.shape if isinstance(s, MatrixLayout) else row, d)
            for s, d in zip(layouts, dtypes, strict=True)
            for _ in range(s.size)
        ),
    )
    return slots


def _check(
    arrays: Sequence[jax.Array],
    xs: Sequence[jax.Array],
    of_xs: Sequence[ArrayLayout],
    channels: int,
) -> None:
    for x, layout in zip(xs, of_xs, strict=True):
        if layout.axis is None:
            raise NotImplementedError(
                f"{OP}: `xs` must have an axis of D={channels} channels in the Pallas kernel, got "
                f"{list(x.shape)}; broadcast it, or use implementation='xla' or None."
            )
    for x in (*arrays, *xs):
        if x.dtype not in DTYPES:
            raise NotImplementedError(
                f"{OP}: arrays of the Pallas kernel must be {', '.join(DTYPES)}, got {x.dtype}; "
                "use implementation='xla' or None."
            )
