"""The floating-point operations that a model's equations ask for, counted from its sizes."""

from __future__ import annotations

import math

import jax

from seqjax import models
from seqjax.layers import Layer


def train_flops(model: models.LanguageModel, batch_size: int, length: int) -> int:
    """Operations of one training step: three times the forward pass, nothing recomputed.

    A multiplication and an addition count as two. Weights count two per element and position
    (the embedding by its use as the output's weights), states what their equations say step by
    step, whatever order the program takes them in; norms, activations and gates along features
    are left out.
    """
    weights = sum(2 * size for size in _used_as_weights(model))
    if model.tie_embeddings:
        weights += 2 * model.vocab_size * model.dim
    states = sum(block.state_flops() for block in model.backbone.stack)
    return 3 * batch_size * length * (weights + states)


def _used_as_weights(model: Layer) -> list[int]:
    """The sizes of the parameters that multiply features."""
    roles = jax.tree.leaves(model.param_roles())
    shapes = jax.tree.leaves(model.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    axes = jax.tree.leaves(model.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return [
        math.prod(shape)
        for role, shape, names in zip(roles, shapes, axes, strict=True)
        if role != "embedding" and len(names) - ("layers" in names) >= 2
    ]


def count_params(model: Layer) -> int:
    """The number of parameters."""
    shapes = jax.tree.leaves(model.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return sum(map(math.prod, shapes))
