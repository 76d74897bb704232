"""Base class of cells: one step of a nonlinear RNN and the structure of its Jacobian."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

Structure = Literal["diagonal", "block", "dense"]
Recurrent = Mapping[str, Literal["vector", "matrix"]]
Params = Mapping[str, jax.Array]
Bounds = tuple[Any, Any]


class Cell(abc.ABC):
    """One unbatched step h_t = f(h_{t-1}, u_t) of an RNN over `dim` channels.

    A subclass is a frozen dataclass. u_t [gates, dim] are the cell's pre-activations without the
    recurrent part, B x_t + b in the papers. A layer computes them for all t in one product, so a
    cell has recurrent parameters only.

    Example:
      >>> import dataclasses
      >>> import jax.numpy as jnp, seqjax
      >>> @dataclasses.dataclass(frozen=True)
      ... class Leaky(seqjax.cells.Cell):
      ...     dim: int
      ...     gates = 1
      ...     structure = "diagonal"
      ...     recurrent = {"w": "vector"}
      ...
      ...     def __call__(self, params, h, u):
      ...         return 0.9 * h + 0.1 * jnp.tanh(params["w"] * h + u[0])
      >>> cell, params = Leaky(dim=4), {"w": jnp.ones(4)}
      >>> hs, _, _ = seqjax.nonlinear_scan(
      ...     cell, params, jnp.ones((2, 5, 1, 4)), cell.initial_state(2)
      ... )
      >>> hs.shape
      (2, 5, 4)

    Attributes:
      dim: channels D.
      gates: pre-activations per channel.
      width: coupled numbers per channel k; a state is [D], or [D, k] where k > 1.
      structure: the structure of dh_t / dh_{t-1}: "diagonal" ([D], elementwise), "block" (k x k per
        channel) or "dense".
      recurrent: the kind of each parameter by name: "vector" [D] or "matrix" [D, D].
    """

    dim: int
    gates: ClassVar[int]
    width: ClassVar[int] = 1
    structure: ClassVar[Structure]
    recurrent: ClassVar[Recurrent]

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(
                f"{type(self).__name__}: `dim` must be a positive integer, got {self.dim!r}."
            )

    @abc.abstractmethod
    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from the state [D] or [D, k] and u [gates, D]."""

    def initial_state(self, batch_size: int, dtype: Any = jnp.float32) -> jax.Array:
        """Return the state before the first step: zeros [batch_size, D] or [batch_size, D, k]."""
        return jnp.zeros((batch_size, self.dim, self.width)[: 2 + (self.width > 1)], dtype)

    def param_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a recurrent parameter: [D] or [D, D]."""
        return (self.dim,) if self.recurrent[name] == "vector" else (self.dim, self.dim)

    def bounds(self, params: Params) -> Bounds | None:
        """Return bounds (lowest, highest) of the state that no step from within them leaves.

        They are broadcastable to a state, and infinite where a number is unbounded; None if all
        numbers are. The state before the first step, zero, lies within them.
        """
        del params
        return None

    def output(self, h: jax.Array) -> jax.Array:
        """Return the part of the state that a layer reads: [..., D] or [..., D, k] -> [..., D]."""
        return h
