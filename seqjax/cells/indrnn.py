"""IndRNN: the independently recurrent network."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class IndRNN(Cell):
    """Independently recurrent neural network (arXiv 1803.04831).

        h' = activation(u + w * h)

    With relu a state grows without bound where w > 1. The paper limits |w| to 2^(1/T) for sequences
    of T steps; here nothing is limited.

    Departures: none.

    Parameters: w [D]. u [1, D]. State: h [D]. Jacobian: diagonal. Bounds: h >= 0 for relu, |h| <= 1
    for tanh.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = IndRNN(dim=3)
      >>> cell({"w": jnp.ones(3)}, jnp.zeros(3), jnp.ones((1, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
      activation: 'relu', as in the paper's experiments, or 'tanh'.
    """

    dim: int
    activation: Literal["relu", "tanh"] = "relu"
    gates: ClassVar[int] = 1
    structure: ClassVar[Structure] = "diagonal"
    recurrent: ClassVar[Recurrent] = {"w": "vector"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ("relu", "tanh"):
            raise ValueError(
                f"IndRNN: `activation` must be 'relu' or 'tanh', got {self.activation!r}."
            )

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [1, D]."""
        activation = jax.nn.relu if self.activation == "relu" else jnp.tanh
        return activation(u[0] + params["w"] * h)

    def bounds(self, params: Params) -> Bounds:
        """Return the range of the activation."""
        del params
        return (0.0, np.inf) if self.activation == "relu" else (-1.0, 1.0)
