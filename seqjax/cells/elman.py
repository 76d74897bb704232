"""Elman: the simple recurrent network."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class Elman(Cell):
    """Simple recurrent network (Elman, Finding structure in time, 1990).

        h' = tanh(u + h W)

    Departures: tanh instead of Elman's logistic function, as in all current libraries.

    Parameters: W [D, D]. u [1, D]. State: h [D]. Jacobian: dense. Bounds: |h| <= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = Elman(dim=3)
      >>> cell({"W": jnp.eye(3)}, jnp.zeros(3), jnp.ones((1, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 1
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"W": "matrix"}

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [1, D]."""
        return jnp.tanh(u[0] + h @ params["W"])

    def bounds(self, params: Params) -> Bounds:
        """Return the range of tanh."""
        del params
        return -1.0, 1.0
