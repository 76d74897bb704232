"""LEM: long expressive memory."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class LEM(Cell):
    """Long expressive memory (arXiv 2110.04744): two states, each with learned time steps.

        s = dt * sigmoid(u_1 + y W_1)
        r = dt * sigmoid(u_2 + y W_2)
        z' = (1 - s) * z + s * tanh(u_z + y W_z)
        y' = (1 - r) * y + r * tanh(u_y + z' W_y)

    Departures: none.

    Parameters: W_1, W_2, W_z, W_y [D, D]. u [4, D] in the order 1, 2, z, y. State: (y, z) as
    [D, 2]; a layer reads y. Jacobian: dense. Bounds: |y|, |z| <= 1, since each is a mean of its old
    value and a tanh, which requires dt <= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = LEM(dim=3, dt=0.5)
      >>> params = dict.fromkeys(("W_1", "W_2", "W_z", "W_y"), jnp.eye(3))
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((4, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
      dt: the largest time step, in (0, 1].
    """

    dim: int
    dt: float = 1.0
    gates: ClassVar[int] = 4
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("W_1", "W_2", "W_z", "W_y"), "matrix")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dt <= 1:
            raise ValueError(
                f"LEM: `dt` must be in (0, 1], got {self.dt}; larger steps may leave the bounds."
            )

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (y, z) [D, 2] and u [4, D]."""
        y, z = h[:, 0], h[:, 1]
        s = self.dt * jax.nn.sigmoid(u[0] + y @ params["W_1"])
        r = self.dt * jax.nn.sigmoid(u[1] + y @ params["W_2"])
        z = (1 - s) * z + s * jnp.tanh(u[2] + y @ params["W_z"])
        y = (1 - r) * y + r * jnp.tanh(u[3] + z @ params["W_y"])
        return jnp.stack([y, z], axis=-1)

    def bounds(self, params: Params) -> Bounds:
        """Return [-1, 1] for both y and z."""
        del params
        return -1.0, 1.0

    def output(self, h: jax.Array) -> jax.Array:
        """Return y from (y, z)."""
        return h[..., 0]
