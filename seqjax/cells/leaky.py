"""LeakyRNN: leaky integrator units with trained time constants."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class LeakyRNN(Cell):
    """Leaky integrator units with trained time constants (Jaeger et al., 2007; arXiv 1804.11188).

        a = exp(-1 / tau)                                                  tau = exp(log_tau)
        h' = a * h + (1 - a) * tanh(u + h W)

    It solves tau dh/dt = -h + tanh(u + h W) over one step, with the tanh held constant.

    Departures: Jaeger et al. take one step of Euler's method, with 1 / tau in place of 1 - a; the
    exact solution is stable for every tau. The logarithm of tau keeps tau positive.

    Parameters: W [D, D], log_tau [D], in steps. u [1, D]. State: h [D]. Jacobian: dense. Bounds:
    |h| <= 1, since h' is a mean of h and a tanh.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = LeakyRNN(dim=3)
      >>> params = {"W": jnp.eye(3), "log_tau": jnp.zeros(3)}
      >>> cell(params, jnp.zeros(3), jnp.ones((1, 3))).shape
      (3,)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 1
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"W": "matrix", "log_tau": "vector"}

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [D] and u [1, D]."""
        exponent = -jnp.exp(-params["log_tau"])
        # expm1 keeps 1 - a exact for long time constants.
        return jnp.exp(exponent) * h - jnp.expm1(exponent) * jnp.tanh(u[0] + h @ params["W"])

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1], because h' is a mean of two numbers in this range."""
        del params
        return -1.0, 1.0
