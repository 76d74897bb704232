"""Floating-point operations of a model's equations, counted from its sizes."""

from __future__ import annotations

import math

import jax

from seqjax import models
from seqjax.layers import Layer


def train_flops(model: models.LanguageModel, batch_size: int, length: int) -> int:
    """Count the operations of a training step: three forward passes, without recomputation.

    A multiplication and an addition are two operations. Each weight counts two operations per
    position; a tied embedding counts as the output's weights. States count the operations of their
    step-by-step equations, independent of the algorithm. Norms, activations and elementwise gates
    are not counted.
    """
    weights = sum(2 * size for size in _used_as_weights(model))
    if model.tie_embeddings:
        weights += 2 * model.vocab_size * model.dim
    states = sum(block.state_flops() for block in model.backbone.stack)
    return 3 * batch_size * length * (weights + states)


def _used_as_weights(model: Layer) -> list[int]:
    """Return the sizes of the parameters that are used in matrix products."""
    roles = jax.tree.leaves(model.param_roles())
    shapes = jax.tree.leaves(model.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    axes = jax.tree.leaves(model.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return [
        math.prod(shape)
        for role, shape, names in zip(roles, shapes, axes, strict=True)
        if role != "embedding" and len(names) - ("layers" in names) >= 2
    ]


def count_params(model: Layer) -> int:
    """Return the number of parameters."""
    shapes = jax.tree.leaves(model.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return sum(map(math.prod, shapes))
