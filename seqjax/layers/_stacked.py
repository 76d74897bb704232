"""Parameters of several equal layers, stacked along a first axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Stacked(Layer):
    """Parameters of `count` equal layers, stacked along a first axis; the owner runs the layers.

    `declare_params` returns the declarations of one layer.

    Attributes:
      layer: one of the layers.
      count: the number of layers.
      axis: the logical name of the first axis.
    """

    layer: Layer
    count: int
    axis: str

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.layer.dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return self.layer.declare_params()

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        return jax.vmap(lambda key: self.layer.init(key, dtype))(jax.random.split(key, self.count))

    def param_axes(self) -> dict[str, Any]:
        return _prepend(self.axis, self.layer.param_axes())

    def param_shapes(self) -> dict[str, Any]:
        return _prepend(self.count, self.layer.param_shapes())

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        raise NotImplementedError("Stacked: the layer that holds the stacked layers runs them.")


def _prepend(first: Any, tree: Any) -> dict[str, Any]:
    return jax.tree.map(
        lambda leaf: (first, *leaf), tree, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
