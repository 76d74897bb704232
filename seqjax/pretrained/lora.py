"""Low-rank adapters: a small trained change of a model's projections."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters for the projections of a model (LoRA, arXiv 2106.09685).

        W' = W + (alpha / rank) A B,    W [in, out], A [in, rank], B [rank, out]

    The adapted weights are the parameters of the role "weight" whose name ends with `_proj`.
    Axes before the last two, such as those of stacked blocks, are kept. A starts normal with
    variance 1 / in, and B with zeros, so that W' = W before the first step. Adapters are float32.

    `merge` adds the product to the weights. Train by differentiating with respect to the adapters
    only: `jax.grad(lambda adapters: loss(lora.merge(params, adapters)))`. The sum is formed in
    float32 and rounded to the dtype of W, so the loss is that of the merged weights.

    Departure from the paper: A starts normal with the variance of the inputs' number, which the
    paper does not state. The sum is formed on the weights, not on the activations.

    `init`, `param_axes`, `param_roles` and `param_shapes` are those of a layer, so that
    `seqjax.sharding.shard` accepts adapters in place of a model.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> layer = seqjax.layers.DeltaNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> lora = LoRA(layer, rank=2)
      >>> adapters = lora.init(jax.random.key(1))
      >>> adapters["q_proj"]["A"].shape, adapters["q_proj"]["B"].shape
      ((8, 2), (2, 8))
      >>> merged = lora.merge(params, adapters)
      >>> bool((merged["q_proj"] == params["q_proj"]).all())
      True

    Attributes:
      model: the model or layer.
      rank: the rank of the change of each weight.
      alpha: the factor of the change is alpha / rank.
    """

    model: Layer
    rank: int
    alpha: float = 16.0

    def __post_init__(self) -> None:
        _checks.positive(self, rank=self.rank)
        _checks.require(self, self.alpha > 0, f"`alpha` must be > 0, got {self.alpha}.")
        _checks.require(
            self,
            bool(self.param_shapes()),
            f"`model` must have weights named *_proj, got {type(self.model).__name__}.",
        )

    def _adapted(self, make: Callable[[tuple[int, ...], tuple[str | None, ...]], Any]) -> Params:
        """Return the tree with make(shape, axes) in place of each adapted weight."""

        def walk(roles: Any, shapes: Any, axes: Any) -> Params:
            tree: Params = {}
            for name, role in roles.items():
                if isinstance(role, Mapping):
                    inner = walk(role, shapes[name], axes[name])
                    tree |= {name: inner} if inner else {}
                elif role == "weight" and name.endswith("_proj"):
                    tree[name] = make(shapes[name], axes[name])
            return tree

        model = self.model
        return walk(model.param_roles(), model.param_shapes(), model.param_axes())

    def declare_params(self) -> Mapping[str, Param | Layer]:
        """Return the model, whose heads bound the mesh axes that fit."""
        return {"model": self.model}

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Return adapters that change nothing: A is random and B is zero."""

        def leaf(number: int, shape: tuple[int, ...]) -> dict[str, jax.Array]:
            drawn = jax.random.normal(jax.random.fold_in(key, number), (*shape[:-1], self.rank))
            zeros = jnp.zeros((*shape[:-2], self.rank, shape[-1]), dtype)
            return {"A": (drawn * shape[-2] ** -0.5).astype(dtype), "B": zeros}

        shapes, tree = jax.tree.flatten(
            self._adapted(lambda shape, axes: shape), is_leaf=lambda x: isinstance(x, tuple)
        )
        return jax.tree.unflatten(tree, [leaf(i, shape) for i, shape in enumerate(shapes)])

    def param_shapes(self) -> Params:
        """Return the shape of each adapter."""
        rank = self.rank
        return self._adapted(
            lambda shape, axes: {
                "A": (*shape[:-1], rank),
                "B": (*shape[:-2], rank, shape[-1]),
            }
        )

    def param_axes(self) -> Params:
        """Return the logical axes of each adapter; the rank is never split."""
        return self._adapted(
            lambda shape, axes: {"A": (*axes[:-1], None), "B": (*axes[:-2], None, axes[-1])}
        )

    def param_roles(self) -> Params:
        """Return the role of each adapter, "weight"."""
        return self._adapted(lambda shape, axes: {"A": "weight", "B": "weight"})

    def merge(self, params: Params, adapters: Params) -> Params:
        """Return the model's parameters with the change added, in the dtypes of `params`.

        Args:
          params: the parameters of the model.
          adapters: a tree that `init` returned, possibly trained.
        """

        def walk(params: Any, adapters: Any) -> Any:
            if not isinstance(params, Mapping):
                change = jnp.matmul(adapters["A"], adapters["B"]) * (self.alpha / self.rank)
                return (params.astype(change.dtype) + change).astype(params.dtype)
            return {
                name: walk(leaf, adapters[name]) if name in adapters else leaf
                for name, leaf in params.items()
            }

        return walk(params, adapters)
