"""Scaled: constant factors on the input, the output and the parameters of a layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Scaled(Layer):
    """A layer with constant factors, as maximal update parametrization uses (arXiv 2203.03466).

        y = output_scale * layer(input_scale * x)

    where each parameter p named in `param_scales` is replaced by its factor times p. Parameters and
    state are those of the layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import GatedMLP
      >>> layer = Scaled(GatedMLP(dim=4), output_scale=0.5, param_scales={"gate_proj": 2.0})
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 2, 4)))
      >>> layer
      Scaled(layer=GatedMLP(dim=4), output_scale=0.5, param_scales=(('gate_proj', 2.0),))

    Attributes:
      layer: the layer.
      input_scale: factor of the input.
      output_scale: factor of the output.
      param_scales: factors of parameters by name, a mapping or pairs.
    """

    layer: Layer
    input_scale: float = 1.0
    output_scale: float = 1.0
    param_scales: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _checks.require(
            self,
            isinstance(self.layer, Layer),
            f"`layer` must be a seqjax layer, got {self.layer!r}.",
        )
        scales = dict(self.param_scales)
        names = self.layer.declare_params()
        for name in scales:
            _checks.require(
                self,
                isinstance(names.get(name), Param),
                f"`param_scales` must name parameters of the layer, got {name!r}; it has"
                f" {', '.join(n for n, entry in names.items() if isinstance(entry, Param))}.",
            )
        object.__setattr__(self, "param_scales", tuple(sorted(scales.items())))

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Number of features, that of the layer."""
        return self.layer.dim

    @property
    def causal(self) -> bool:
        """True if the layer is causal."""
        return self.layer.causal

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Draw the parameters of the layer; see `Layer.init`."""
        return self.layer.init(key, dtype)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return self.layer.declare_params()

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self.layer.make_state(batch_size, dtype)

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return self.layer.make_values(batch_size, length, dtype)

    def declare_shared(self) -> Mapping[str, Layer]:
        return self.layer.declare_shared()

    def visible_params(self, params: Params) -> dict[str, list[jax.Array]]:
        return self.layer.visible_params(self._scaled(params))

    def _scaled(self, params: Params) -> Params:
        return params | {
            name: params[name] * scale for name, scale in dict(self.param_scales).items()
        }

    def state_flops(self) -> int:
        return self.layer.state_flops()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        if self.input_scale != 1:
            x = x * self.input_scale
        y, state = self.layer.forward(self._scaled(params), x, state, context)
        return y if self.output_scale == 1 else y * self.output_scale, state
