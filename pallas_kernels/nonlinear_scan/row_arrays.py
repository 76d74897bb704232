"""Arrays of rows of channels, and the layouts of a cell's arrays in the kernels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sizes(NamedTuple):
    """Number of channels of a program, and the shape of a row."""

    channels: int
    row: tuple[int, ...]


class Matrix(NamedTuple):
    """A matrix [D, D] that rows are multiplied by."""

    array: Any


class MatrixLayout(NamedTuple):
    """Layout of an argument that is a matrix. The matrix takes the place of one row."""

    shape: tuple[int, int]
    size: int = 1

    def from_rows(self, rows: Sequence[jax.Array]) -> Matrix:
        """Return the matrix."""
        return Matrix(rows[0])


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
