"""SRU: the recurrence of the simple recurrent unit."""

import dataclasses
from typing import ClassVar

import jax

from seqjax.cells._base import Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class SRU(Cell):
    """Recurrence of the simple recurrent unit (arXiv 1709.02755).

        f = sigmoid(u_f + v_f * c)
        c' = f * c + (1 - f) * u_z

    The reset gate and the highway connection of the paper read c and c' from outside the
    recurrence; `seqjax.layers.SRU` has them.

    Departures: none.

    Parameters: v_f [D]. u [2, D] in the order z, f. State: c [D]. Jacobian: diagonal. Bounds: none,
    since u_z is unbounded.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = SRU(dim=3)
      >>> cell({"v_f": jnp.ones(3)}, jnp.zeros(3), jnp.ones((2, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 2
    structure: ClassVar[Structure] = "diagonal"
    recurrent: ClassVar[Recurrent] = {"v_f": "vector"}

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from c [D] and u [2, D]."""
        gate = u[1] + params["v_f"] * h
        return jax.nn.sigmoid(gate) * h + jax.nn.sigmoid(-gate) * u[0]
