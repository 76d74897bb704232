"""GRU: the gated recurrent unit."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class GRU(Cell):
    """Gated recurrent unit (arXiv 1406.1078), as in PyTorch and cuDNN.

        r = sigmoid(u_r + h W_r)
        z = sigmoid(u_z + h W_z)
        n = tanh(u_n + r * (h W_n + n_bias))
        h' = (1 - z) * n + z * h

    Departures: the paper resets the state before the product, n = tanh(u_n + (r * h) W_n). The form
    here is PyTorch's, which resets after the product, so that all three products are of h.

    Parameters: W_r, W_z, W_n [D, D], n_bias [D]. u [3, D] in the order r, z, n. State: h [D].
    Jacobian: dense. Bounds: |h| <= 1, since h' is a mean of h and a tanh.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = GRU(dim=3)
      >>> params = dict.fromkeys(("W_r", "W_z", "W_n"), jnp.eye(3)) | {"n_bias": jnp.zeros(3)}
      >>> cell(params, jnp.zeros(3), jnp.ones((3, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 3
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {
        "W_r": "matrix",
        "W_z": "matrix",
        "W_n": "matrix",
        "n_bias": "vector",
    }

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [3, D]."""
        r = jax.nn.sigmoid(u[0] + h @ params["W_r"])
        z = jax.nn.sigmoid(u[1] + h @ params["W_z"])
        n = jnp.tanh(u[2] + r * (h @ params["W_n"] + params["n_bias"]))
        return (1 - z) * n + z * h

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1], because h' is a mean of two numbers in this range."""
        del params
        return -1.0, 1.0
