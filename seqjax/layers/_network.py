"""Small networks that serve as memories: their weights are the state of a recurrence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _init
from seqjax.layers._base import Initializer, Param, Params

Array = jax.Array
Product = Callable[[int, Array], Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network per head with one affine map, or two and a gelu between them.

    Its weights are matrices [H, I, O], or [H, I + 1, O] with the bias in the last row.

    Attributes:
      heads: number of heads H.
      sizes: features of the input, of the hidden layer if there is one, and of the output.
      bias: whether the maps have biases.
    """

    heads: int
    sizes: tuple[int, ...]
    bias: bool

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes of the matrices of one head."""
        pairs = zip(self.sizes[:-1], self.sizes[1:], strict=True)
        return [(inputs + self.bias, outputs) for inputs, outputs in pairs]

    @property
    def size(self) -> int:
        """The number of weights of all heads."""
        return self.heads * sum(inputs * outputs for inputs, outputs in self.shapes)

    def declare_params(self, initializer: Initializer) -> dict[str, Param]:
        """Return the learned start: W1 and W2 [H, I, O], with biases also b1 and b2 [H, O]."""
        params = {}
        for i, (inputs, outputs) in enumerate(self.shapes, 1):
            shape = (self.heads, inputs - self.bias, outputs)
            params[f"W{i}"] = Param(shape, ("heads", None, None), "recurrence", initializer)
            if self.bias:
                params[f"b{i}"] = Param(
                    (self.heads, outputs), ("heads", None), "recurrence", _init.zeros
                )
        return params

    def weights(self, params: Params, dtype: Any) -> list[Array]:
        """Return the matrices of the learned start."""
        found = []
        for i in range(1, len(self.sizes)):
            weight = params[f"W{i}"].astype(dtype)
            if self.bias:
                bias = params[f"b{i}"].astype(dtype)
                weight = jnp.concatenate([weight, bias[:, None]], axis=1)
            found.append(weight)
        return found

    def __call__(self, product: Product, x: Array) -> tuple[Array, list[Array]]:
        """Return the output, and the input of each affine map, which `product` computes."""
        inputs = []
        for i in range(len(self.sizes) - 1):
            if i:
                x = jax.nn.gelu(x)
            if self.bias:
                x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
            inputs.append(x)
            x = product(i, x)
        return x, inputs
