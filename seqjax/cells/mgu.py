"""MGU: the minimal gated unit."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class MGU(Cell):
    """Minimal gated unit (arXiv 1603.09420): a GRU whose two gates are one.

        f = sigmoid(u_f + h W_f)
        n = tanh(u_n + (f * h) W_n)
        h' = (1 - f) * h + f * n

    Departures: none.

    Parameters: W_f, W_n [D, D]. u [2, D] in the order f, n. State: h [D]. Jacobian: dense. Bounds:
    |h| <= 1, since h' is a mean of h and a tanh.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = MGU(dim=3)
      >>> cell({"W_f": jnp.eye(3), "W_n": jnp.eye(3)}, jnp.zeros(3), jnp.ones((2, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 2
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"W_f": "matrix", "W_n": "matrix"}

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [2, D]."""
        f = jax.nn.sigmoid(u[0] + h @ params["W_f"])
        n = jnp.tanh(u[1] + (f * h) @ params["W_n"])
        return (1 - f) * h + f * n

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1], because h' is a mean of two numbers in this range."""
        del params
        return -1.0, 1.0
