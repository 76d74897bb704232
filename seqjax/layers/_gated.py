"""Base class of layers with an elementwise linear recurrence whose gates depend on the input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.linear_scan import linear_scan


@dataclasses.dataclass(frozen=True)
class Gated(Layer):
    """A layer with the state h_t = a_t * h_{t-1} + x_t over N channels.

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
    """

    dim: int
    state_dim: int | None = None

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.states)

    @property
    def states(self) -> int:
        """Channels N: `state_dim`, by default `dim`."""
        return self.dim if self.state_dim is None else self.state_dim

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.states), dtype)

    def state_flops(self) -> int:
        return 4 * self.states  # recurrence 2, weight of the input 1, output gate 1

    def _inward(self) -> Param:
        """Return the declaration of a projection [dim, N]."""
        return Param((self.dim, self.states), ("embed", "state"), "weight", _init.fan_in_normal)

    def _outward(self) -> Param:
        """Return the declaration of a projection [N, dim]."""
        return Param((self.states, self.dim), ("state", "embed"), "weight", _init.fan_in_normal)

    def _outward_if_needed(self) -> dict[str, Param]:
        """Return the output projection, or nothing if the state already has `dim` features."""
        return {} if self.states == self.dim else {"out_proj": self._outward()}

    def _bias(self, initializer: Any = _init.zeros) -> Param:
        """Return the declaration of a bias [N] that is added in the state dtype."""
        return Param((self.states,), ("state",), "recurrence", initializer)


def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Return x W + bias in the state dtype, with the product in the dtype of `x`."""
    wide = state_dtype(x.dtype)
    y = dense(x, weight).astype(wide)
    return y if bias is None else y + bias.astype(wide)


def project_out(h: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    """Return h in the dtype of `x`, times `out_proj` if the parameters have it."""
    h = h.astype(x.dtype)
    return dense(h, params["out_proj"]) if "out_proj" in params else h


def recur(
    decay: jax.Array, x: jax.Array, state: State, context: Context
) -> tuple[jax.Array, jax.Array]:
    """Return `linear_scan` with the resets and the sequence axis of the context."""
    return linear_scan(decay, x, state, reset=context.reset, sequence_axis=context.sequence_axis)
