"""LSTM: long short-term memory."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class LSTM(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate by Gers et al., 2000).

        i = sigmoid(u_i + h W_i)
        f = sigmoid(u_f + h W_f)
        g = tanh(u_g + h W_g)
        o = sigmoid(u_o + h W_o)
        c' = f * c + i * g
        h' = o * tanh(c')

    Departures: none from the form of PyTorch and cuDNN; no peepholes.

    Parameters: W_i, W_f, W_g, W_o [D, D]. u [4, D] in the order i, f, g, o. State: (c, h) as
    [D, 2]; a layer reads h. Jacobian: dense. Bounds: |h| <= 1. c is unbounded, because f and i may
    both be near 1 for any number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = LSTM(dim=3)
      >>> params = dict.fromkeys(("W_i", "W_f", "W_g", "W_o"), jnp.eye(3))
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((4, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 4
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("W_i", "W_f", "W_g", "W_o"), "matrix")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (c, h) [D, 2] and u [4, D]."""
        c, h = h[:, 0], h[:, 1]
        i = jax.nn.sigmoid(u[0] + h @ params["W_i"])
        f = jax.nn.sigmoid(u[1] + h @ params["W_f"])
        g = jnp.tanh(u[2] + h @ params["W_g"])
        o = jax.nn.sigmoid(u[3] + h @ params["W_o"])
        c = f * c + i * g
        return jnp.stack([c, o * jnp.tanh(c)], axis=-1)

    def bounds(self, params: Params) -> Bounds:
        """Return no bounds for c, and [-1, 1] for h."""
        high = np.array([np.inf, 1.0], params["W_i"].dtype)  # NumPy, because of `jax.debug_infs`
        return -high, high

    def output(self, h: jax.Array) -> jax.Array:
        """Return h from (c, h)."""
        return h[..., 1]
