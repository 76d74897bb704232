"""LTC: the liquid time-constant network."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class LTC(Cell):
    """Liquid time-constant network (arXiv 2006.04439), with one step of its fused solver.

        f = sigmoid(u + h W)
        h' = (h + dt * f * A) / (1 + dt * (1 / tau + f))          tau = exp(log_tau)

    It discretises dh/dt = -(1 / tau + f) h + f A.

    Departures: the solver takes one step of length dt per input; the paper takes several. The paper
    does not specify the nonlinearity. The sigmoid keeps f positive, which the paper's bounds
    require. The logarithm of tau keeps tau positive.

    Parameters: W [D, D], A, log_tau [D]. u [1, D]. State: h [D]. Jacobian: dense. Bounds:
    min(A, 0) <= h <= max(A, 0), since h' is a mean of h, A and 0.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = LTC(dim=3)
      >>> params = {"W": jnp.eye(3), "A": jnp.ones(3), "log_tau": jnp.zeros(3)}
      >>> cell(params, jnp.zeros(3), jnp.ones((1, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
      dt: step of the solver, positive.
    """

    dim: int
    dt: float = 1.0
    gates: ClassVar[int] = 1
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"W": "matrix", "A": "vector", "log_tau": "vector"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dt < float("inf"):
            raise ValueError(f"LTC: `dt` must be positive and finite, got {self.dt}.")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [1, D]."""
        f = jax.nn.sigmoid(u[0] + h @ params["W"])
        rate = jnp.exp(-params["log_tau"]) + f
        return (h + self.dt * f * params["A"]) / (1 + self.dt * rate)

    def bounds(self, params: Params) -> Bounds:
        """Return the range between A and 0, per channel."""
        return jnp.minimum(params["A"], 0), jnp.maximum(params["A"], 0)
