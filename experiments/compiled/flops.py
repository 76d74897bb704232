"""The floating-point operations that a model's equations ask for, counted from its sizes."""

from __future__ import annotations

import math

import jax

from seqjax import layers, models
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
    states = sum(state_flops(mixer) for mixer in model.backbone.layers)
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


def state_flops(layer: Layer) -> int:
    """Operations on a layer's state, for one position."""
    match layer:
        case layers.DeltaNet():  # k S, the write, q S, and the decay
            size = layer.heads * layer.key_dim * layer.value_dim
            return (7 if layer.gated else 6) * size
        case layers.GateLoop():  # complex: decay 6, write 8, read 8
            return 22 * layer.heads * layer.key_dim**2
        case layers.Mamba():  # exp(dt A) 2, dt B x 2, decay and add 2, C h 2
            return 8 * layer.expand * layer.dim * layer.state_dim
        case layers.LRU():  # one complex product and sum
            return 8 * layer.states
        case layers.S5():
            return 8 * (layer.states // 2) * (2 if layer.bidirectional else 1)
        case layers.SlidingWindowAttention():  # scores and their sum
            return 4 * layer.window * layer.heads * layer.key_dim
        case layers.RNN():  # products with diagonal weights and gates; matrices count as weights
            return 8 * layer.cell.gates * layer.states
    raise NotImplementedError(
        f"{type(layer).__name__}: no count of its operations; add a case to state_flops."
    )
