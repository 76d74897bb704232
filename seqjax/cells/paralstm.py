"""ParaLSTM: the LSTM with a diagonal recurrence."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class ParaLSTM(Cell):
    """The LSTM of ParaRNN (arXiv 2510.21450): diagonal, coupled gates, peepholes.

        f = sigmoid(u_f + A_f * h + C_f * c)
        g = tanh(u_g + A_g * h)
        c' = f * c + (1 - f) * g
        o = sigmoid(u_o + A_o * h + C_o * c')
        h' = o * tanh(c')

    Departures: none in the cell. In the authors' code the input matrices, which are part of the
    layer here, are block-diagonal over heads.

    Parameters: A_f, A_g, A_o, C_f, C_o [D]. u [3, D] in the order f, g, o. State: (c, h) as [D, 2];
    a layer reads h. Jacobian: blocks of 2 x 2. Bounds: |c| <= 1, since c' is a mean of c and a
    tanh, and |h| <= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = ParaLSTM(dim=3)
      >>> params = dict.fromkeys(("A_f", "A_g", "A_o", "C_f", "C_o"), jnp.ones(3))
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((3, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 3
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "block"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("A_f", "A_g", "A_o", "C_f", "C_o"), "vector")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (c, h) [D, 2] and u [3, D]."""
        c, h = h[:, 0], h[:, 1]
        f = jax.nn.sigmoid(u[0] + params["A_f"] * h + params["C_f"] * c)
        g = jnp.tanh(u[1] + params["A_g"] * h)
        c = f * c + (1 - f) * g
        o = jax.nn.sigmoid(u[2] + params["A_o"] * h + params["C_o"] * c)
        return jnp.stack([c, o * jnp.tanh(c)], axis=-1)

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1] for both c and h."""
        del params
        return -1.0, 1.0

    def output(self, h: jax.Array) -> jax.Array:
        """Return h from (c, h)."""
        return h[..., 1]
