"""ParaGRU: the GRU with a diagonal recurrence."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class ParaGRU(Cell):
    """The GRU of ParaRNN (arXiv 2510.21450), with independent channels in the recurrence.

        z = sigmoid(u_z + A_z * h)
        r = sigmoid(u_r + A_r * h)
        n = tanh(u_n + A_n * h * r)
        h' = (1 - z) * h + z * n

    Departures: none in the cell. In the authors' code the input matrices, which are part of the
    layer here, are block-diagonal over heads.

    Parameters: A_z, A_r, A_n [D]. u [3, D] in the order z, r, n. State: h [D]. Jacobian: diagonal.
    Bounds: |h| <= 1, since h' is a mean of h and a tanh.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = ParaGRU(dim=3)
      >>> params = dict.fromkeys(("A_z", "A_r", "A_n"), jnp.ones(3))
      >>> cell(params, jnp.zeros(3), jnp.ones((3, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 3
    structure: ClassVar[Structure] = "diagonal"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("A_z", "A_r", "A_n"), "vector")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [3, D]."""
        z = jax.nn.sigmoid(u[0] + params["A_z"] * h)
        r = jax.nn.sigmoid(u[1] + params["A_r"] * h)
        n = jnp.tanh(u[2] + params["A_n"] * h * r)
        return (1 - z) * h + z * n

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1], because h' is a mean of two numbers in this range."""
        del params
        return -1.0, 1.0
