"""CoRNN and UnICORNN: networks of oscillators."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class CoRNN(Cell):
    """Coupled oscillatory RNN (arXiv 2010.00951): damped, forced, coupled oscillators.

        z' = z + dt * (tanh(u + y W_y + z W_z) - gamma * y - epsilon * z)
        y' = y + dt * z'

    Departures: none from the authors' code.

    Parameters: W_y, W_z [D, D]. u [1, D]. State: (y, z) as [D, 2]; a layer reads y. Jacobian:
    dense. Bounds: none.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = CoRNN(dim=3)
      >>> params = {"W_y": jnp.eye(3), "W_z": jnp.eye(3)}
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((1, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
      dt: time step, positive. The defaults of dt, gamma and epsilon are the authors' values for
        sequential MNIST. For permuted MNIST they use 0.076, 0.4 and 8.
      gamma: squared frequency of the oscillators, not negative.
      epsilon: damping, not negative.
    """

    dim: int
    dt: float = 0.042
    gamma: float = 2.7
    epsilon: float = 4.7
    gates: ClassVar[int] = 1
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = {"W_y": "matrix", "W_z": "matrix"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, dt=self.dt)
        _not_negative(self, gamma=self.gamma, epsilon=self.epsilon)

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (y, z) [D, 2] and u [1, D]."""
        y, z = h[:, 0], h[:, 1]
        force = jnp.tanh(u[0] + y @ params["W_y"] + z @ params["W_z"])
        z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
        return jnp.stack([y + self.dt * z, z], axis=-1)

    def output(self, h: jax.Array) -> jax.Array:
        """Return y from (y, z)."""
        return h[..., 0]


@dataclasses.dataclass(frozen=True)
class UnICORNN(Cell):
    """Undamped independent controlled oscillatory RNN (arXiv 2103.05487).

        s = dt * sigmoid(c)
        z' = z - s * (tanh(u + w * y) + alpha * y)
        y' = y + s * z'

    The oscillators are not damped, so no input is forgotten. Steps with s^2 (alpha + w) > 4 are
    unstable. Rounding errors accumulate over long sequences.

    Departures: none.

    Parameters: w, c [D]. u [1, D]. State: (y, z) as [D, 2]; a layer reads y. Jacobian: blocks of
    2 x 2. Bounds: none.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = UnICORNN(dim=3)
      >>> params = {"w": jnp.ones(3), "c": jnp.zeros(3)}
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((1, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
      dt: largest time step, positive. The defaults of dt and alpha are those of the authors for
        permuted MNIST.
      alpha: squared frequency of the oscillators without w, not negative.
    """

    dim: int
    dt: float = 0.19
    alpha: float = 30.65
    gates: ClassVar[int] = 1
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "block"
    recurrent: ClassVar[Recurrent] = {"w": "vector", "c": "vector"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, dt=self.dt)
        _not_negative(self, alpha=self.alpha)

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (y, z) [D, 2] and u [1, D]."""
        y, z = h[:, 0], h[:, 1]
        s = self.dt * jax.nn.sigmoid(params["c"])
        z = z - s * (jnp.tanh(u[0] + params["w"] * y) + self.alpha * y)
        return jnp.stack([y + s * z, z], axis=-1)

    def output(self, h: jax.Array) -> jax.Array:
        """Return y from (y, z)."""
        return h[..., 0]


def _positive(cell: Cell, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(
                f"{type(cell).__name__}: `{name}` must be positive and finite, got {value}."
            )


def _not_negative(cell: Cell, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{type(cell).__name__}: `{name}` must be >= 0 and finite, got {value}."
            )
