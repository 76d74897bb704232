"""A model from features to numbers at every position, for regression and for control."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax import layers, models
from seqjax.layers import Param


@dataclasses.dataclass(frozen=True)
class FeatureModel(layers.Layer):
    """A backbone between two linear maps: y_t = backbone(x_t W + b) V + c.

    Inputs are features [B, T, inputs]. Outputs are numbers [B, T, outputs], in float32 or better.
    The methods are those of a layer.

    Attributes:
      inputs: features per position.
      outputs: numbers per position.
      backbone: the stack of blocks.
      dtype: dtype of the backbone's computation.
      dim: features of the backbone.
    """

    inputs: int
    outputs: int
    backbone: models.Backbone
    dtype: str = "float32"
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.backbone.dim)

    @property
    def causal(self) -> bool:
        """True if the backbone is causal."""
        return self.backbone.causal

    def declare_params(self) -> Mapping[str, Param | layers.Layer]:
        """Return the two linear maps and the backbone."""
        lecun, zeros = jax.nn.initializers.lecun_normal(), jax.nn.initializers.zeros
        return {
            "input_proj": Param((self.inputs, self.dim), (None, "embed"), "weight", lecun),
            "input_bias": Param((self.dim,), ("embed",), "bias", zeros),
            "backbone": self.backbone,
            "head": Param((self.dim, self.outputs), ("embed", None), "weight", lecun),
            "head_bias": Param((self.outputs,), (None,), "bias", zeros),
        }

    def initial_state(self, batch_size: int, dtype: Any = None) -> Any:
        """Return the state before the first position, by default for the model's `dtype`."""
        return super().initial_state(batch_size, self.dtype if dtype is None else dtype)

    def make_state(self, batch_size: int, dtype: Any) -> Any:
        """Return the backbone's state."""
        return self.backbone.make_state(batch_size, dtype)

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        if x.shape[-1:] != (self.inputs,) or x.ndim != 3 - one_step:
            lead = "B" if one_step else "B, T"
            raise ValueError(f"FeatureModel: `x` must be [{lead}, {self.inputs}], got {x.shape}.")
        return jnp.dtype(self.dtype)

    def forward(
        self, params: dict[str, Any], x: jax.Array, state: Any, context: Any
    ) -> tuple[jax.Array, Any]:
        """Return the outputs and the backbone's state."""
        weight, bias = (params[f"input_{name}"].astype(self.dtype) for name in ("proj", "bias"))
        hidden = x.astype(self.dtype) @ weight + bias
        hidden, state = self.backbone.forward(params["backbone"], hidden, state, context)
        hidden = hidden.astype(jnp.promote_types(self.dtype, jnp.float32))
        return hidden @ params["head"] + params["head_bias"], state
