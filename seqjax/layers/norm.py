"""Norms over the features of each position: RMS norm and layer norm."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import layer_normalize, rms_normalize
from seqjax.layers.context import Context

NormKind = Literal["rms", "rms_offset", "layer"]


@dataclasses.dataclass(frozen=True)
class RMSNorm(Layer):
    """Root-mean-square normalization (arXiv 1910.07467).

        y = x / sqrt(mean(x^2) + eps) * scale            offset=False, scale starts at 1
        y = x / sqrt(mean(x^2) + eps) * (1 + scale)      offset=True, scale starts at 0

    over the features of each position, the statistics in float32 or better. The layer acts on one
    position at a time: its state is the empty tuple and `reset` has no effect.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RMSNorm(dim=4)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.full((1, 2, 4), 3.0))
      >>> y.shape, float(y[0, 0, 0].round(3)), state
      ((1, 2, 4), 1.0, ())

    Attributes:
      dim: features of input and output.
      eps: constant added to the mean square.
      offset: whether 1 is added to the scale.
    """

    dim: int
    eps: float = 1e-6
    offset: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.above_zero(self, eps=self.eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        start = _init.zeros if self.offset else _init.ones
        return {"scale": Param((self.dim,), ("embed",), "norm", start)}

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        scale = params["scale"]
        if self.offset:
            scale = 1 + scale.astype(state_dtype(x.dtype))
        return rms_normalize(x, scale, self.eps), state


@dataclasses.dataclass(frozen=True)
class LayerNorm(Layer):
    """Layer normalization (arXiv 1607.06450).

        y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias

    over the features of each position, with the biased variance, the statistics in float32 or
    better. The scale starts at 1, the bias at 0. The state is the empty tuple.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LayerNorm(dim=2)
      >>> y, _ = layer.apply(layer.init(jax.random.key(0)), jnp.array([[[1.0, 3.0]]]))
      >>> y.round(3).tolist()
      [[[-1.0, 1.0]]]

    Attributes:
      dim: features of input and output.
      eps: constant added to the variance.
      bias: whether there is a bias.
    """

    dim: int
    eps: float = 1e-6
    bias: bool = True

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.above_zero(self, eps=self.eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {
            "scale": Param((self.dim,), ("embed",), "norm", _init.ones)
        }
        if self.bias:
            params["bias"] = Param((self.dim,), ("embed",), "norm", _init.zeros)
        return params

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        return layer_normalize(x, params["scale"], params.get("bias"), self.eps), state


def _rms_offset(dim: int, eps: float) -> Layer:
    return RMSNorm(dim, eps, offset=True)


NORMS: Mapping[str, Callable[[int, float], Layer]] = MappingProxyType(
    {"rms": RMSNorm, "rms_offset": _rms_offset, "layer": LayerNorm}
)
