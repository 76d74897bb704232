"""RMSNorm: scale to unit root mean square."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import rms_normalize


@dataclasses.dataclass(frozen=True)
class RMSNorm(Layer):
    """Root-mean-square normalisation (arXiv 1910.07467).

        y = x / sqrt(mean(x^2) + eps) * scale

    over the features of each position, the statistics in float32 or better. The layer looks at one
    position at a time: its state is the empty tuple and `reset` changes nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RMSNorm(dim=4)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.full((1, 2, 4), 3.0))
      >>> y.shape, float(y[0, 0, 0].round(3)), state
      ((1, 2, 4), 1.0, ())

    Attributes:
      dim: features of input and output.
      eps: added to the mean square.
    """

    dim: int
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.require(self, self.eps > 0, f"eps must be > 0, given {self.eps}.")

    def _params(self) -> Mapping[str, Param | Layer]:
        return {"scale": Param((self.dim,), ("embed",), "norm", _init.ones)}

    def _initial_state(self, batch_size: int, dtype: Any) -> State:
        return ()

    def _apply(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        return rms_normalize(x, params["scale"], self.eps), state
