"""GatedConv: a short convolution between two gates."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv


@dataclasses.dataclass(frozen=True)
class GatedConv(Layer):
    """Double-gated short convolution of LFM2 (arXiv 2511.23404).

        y_t = (x_t W_C * conv(x W_B * x W_in)_t) W_out

    The convolution has no activation. Projections start normal with variance 1/fan_in.

    Departures: published checkpoints store W_B, W_C and W_in in one array, in this order.

    Parameters: B_proj, C_proj, in_proj, out_proj [dim, dim]; conv (a `ShortConv`); with `bias`
    B_bias, C_bias, in_bias, out_bias [dim].
    State: the last size - 1 inputs of the convolution [B, size - 1, dim], oldest first.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GatedConv(dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 2, 4))

    Attributes:
      dim: features of input and output.
      size: number of taps, including the current position.
      bias: whether the projections and the convolution have biases.
    """

    dim: int
    size: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, size=self.size)

    @property
    def _conv(self) -> ShortConv:
        return ShortConv(self.dim, self.size, bias=self.bias, channel_axis="mlp")

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "mlp"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {
            "B_proj": inward,
            "C_proj": inward,
            "in_proj": inward,
            "conv": self._conv,
            "out_proj": Param(
                (self.dim, self.dim), ("mlp", "embed"), "weight", _init.fan_in_normal
            ),
        }
        if self.bias:
            bias = Param((self.dim,), ("mlp",), "bias", _init.zeros)
            params |= dict.fromkeys(("B_bias", "C_bias", "in_bias"), bias)
            params["out_bias"] = Param((self.dim,), ("embed",), "bias", _init.zeros)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self._conv.make_state(batch_size, dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        B, C, u = (
            dense(x, params[f"{name}_proj"], params.get(f"{name}_bias"))
            for name in ("B", "C", "in")
        )
        y, state = self._conv.forward(params["conv"], B * u, state, context)
        return dense(C * y, params["out_proj"], params.get("out_bias")), state
