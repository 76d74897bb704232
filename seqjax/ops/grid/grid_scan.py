"""Scans of a linear recurrence over a grid [B, X, Y, ...], by diagonals or row by row.

The states of a node depend on those of its two predecessors, (x - 1, y) and (x, y - 1). All nodes
of an anti-diagonal x + y = d are independent. So `by_diagonals` takes X + Y - 1 steps, each for one
diagonal. `by_rows` takes X steps, each with a scan of log depth along a row. Both are exact.

Both keep the states of one diagonal or row, and save one in `CHUNK` for the backward pass.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqjax.ops.core import explicit_mesh
from seqjax.ops.core.checkpointed_scan import time_scan
from seqjax.types import Array, PyTree

Algorithm = Literal["diagonals", "rows"]
# (states at (x - 1, y), states at (x, y - 1), inputs, *shared) -> (states, outputs)
Node = Callable[..., tuple[PyTree, PyTree]]
# (states of the row before, inputs, *shared) -> (states of the row, outputs)
Row = Callable[..., tuple[PyTree, PyTree]]
CHUNK = 8


def check_algorithm(op: str, algorithm: Any) -> None:
    """Raise unless the algorithm is None or has a known name."""
    if algorithm is not None and algorithm not in get_args(Algorithm):
        names = ", ".join(map(repr, get_args(Algorithm)))
        raise ValueError(f"{op}: `algorithm` must be one of {names} or None, got {algorithm!r}.")


def by_diagonals(node: Node, state: PyTree, inputs: PyTree, shared: tuple[Array, ...] = ()) -> Any:
    """Run `node` on one anti-diagonal after the other.

    Args:
      node: the recurrence of all nodes of a diagonal; arrays are [B, Y, ...].
      state: zeros, pytree of [B, Y, ...] arrays.
      inputs: pytree of [B, X, Y, ...] arrays.
      shared: arrays that all nodes share.

    Returns:
      The outputs, pytree of [B, X, Y, ...] arrays.
    """
    batch, rows, columns = jax.tree.leaves(inputs)[0].shape[:3]
    place = np.arange(rows + columns - 1)[:, None] - np.arange(columns)  # x of a lane
    inside = jnp.broadcast_to((place >= 0) & (place < rows), (batch, *place.shape))

    def step(before: PyTree, now: Any, *shared: Array) -> tuple[PyTree, PyTree]:
        values, inside = now
        new, out = node(before, shifted(before), values, *shared)

        def kept(z: Array) -> Array:
            return jnp.where(inside.reshape(*inside.shape, *(1,) * (z.ndim - 2)), z, 0)

        return jax.tree.map(kept, new), out

    out, _ = time_scan(step, state, (jax.tree.map(_skewed, inputs), inside), CHUNK, shared)
    return jax.tree.map(lambda y: _straight(y, rows), out)


def by_rows(row: Row, state: PyTree, inputs: PyTree, shared: tuple[Array, ...] = ()) -> Any:
    """Run `row` on one row [B, Y, ...] of the inputs [B, X, Y, ...] after the other."""
    return time_scan(row, state, inputs, CHUNK, shared)[0]


def scan_row(decay: Array, x: Array) -> Array:
    """Return h_y = a_y h_{y-1} + x_y along axis 1, in log depth."""

    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return lax.associative_scan(combine, (decay, x), axis=1)[1]


def shifted(tree: PyTree) -> PyTree:
    """Return the values at y - 1, zero at y = 0, of a pytree of [B, Y, ...] arrays."""

    def shift(z: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(z[:, :1]), z[:, :-1]], axis=1)

    return jax.tree.map(shift, tree)


def _skewed(z: Array) -> Array:
    """Return [B, X + Y - 1, Y, ...] with element (x + y, y) from element (x, y), else zero."""
    batch, rows, columns, *rest = z.shape
    z = jnp.moveaxis(z, 2, 1)
    z = jnp.pad(z, ((0, 0), (0, 0), (0, columns)) + ((0, 0),) * len(rest))
    # Without the last elements, a row of the reshaped array is one shorter: each row moves by one.
    z = z.reshape(batch, -1, *rest)[:, : columns * (rows + columns - 1)]
    return jnp.moveaxis(z.reshape(batch, columns, rows + columns - 1, *rest), 1, 2)


def _straight(z: Array, rows: int) -> Array:
    """Return [B, X, Y, ...], the inverse of `_skewed`."""
    batch, _, columns, *rest = z.shape
    z = jnp.moveaxis(z, 2, 1).reshape(batch, -1, *rest)
    z = jnp.pad(z, ((0, 0), (0, columns)) + ((0, 0),) * len(rest))
    z = z.reshape(batch, columns, rows + columns, *rest)[:, :, :rows]
    return jnp.moveaxis(z, 2, 1)


def like(name: str) -> explicit_mesh.Specs:
    """Return the specs of an op whose output is split as the argument `name` is."""
    return lambda arguments, out: explicit_mesh.joined(*explicit_mesh.spec_of(arguments[name]))
