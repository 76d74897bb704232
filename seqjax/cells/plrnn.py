"""PLRNN: the piecewise-linear recurrent network."""

import dataclasses
from typing import ClassVar

import jax

from seqjax.cells._base import Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class PLRNN(Cell):
    """Piecewise-linear RNN (Durstewitz, 2017, arXiv 1612.07846), for dynamical systems.

        h' = a * h + relu(h) W + u

    Between the planes h_i = 0 the step is affine, so that fixed points and cycles can be computed.

    Departures: the paper has relu(h - theta) with thresholds theta, later work relu(h) as here; W
    has a diagonal, which the paper sets to zero; the noise of the paper's
    probabilistic model is not part of the cell.

    Parameters: a [D], W [D, D]. u [1, D]. State: h [D]. Jacobian: dense. Bounds: none.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = PLRNN(dim=3)
      >>> cell({"a": jnp.ones(3), "W": jnp.eye(3)}, jnp.zeros(3), jnp.ones((1, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 1
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"a": "vector", "W": "matrix"}

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [1, D]."""
        return params["a"] * h + jax.nn.relu(h) @ params["W"] + u[0]
