"""Tiny language models for the tests of generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import LRU, REGISTRY, DeltaNet, SlidingWindowAttention
from seqjax.models import Backbone, LanguageModel

VOCAB = 11


def with_params(model, seed=0):
    """Return the model and random float32 parameters, all of them away from their start."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    init = jax.jit(model.init)(jax.random.key(seed))
    noise = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape).astype(np.float32), shapes)
    return model, jax.tree.map(lambda p, n: p + n, init, noise)


@functools.cache
def of_layer(name):
    """Return a model of one block with the registered layer, and its parameters."""
    entry = REGISTRY[name]
    layer = entry.make(8, **entry.defaults(8, 2))
    return with_params(LanguageModel(VOCAB, Backbone(layer, mlp_ratio=0)))


@functools.cache
def hybrid():
    """Return a model with a matrix state and an attention cache, and its parameters."""
    layers = DeltaNet(8, heads=2), SlidingWindowAttention(8, heads=2, window=4)
    return with_params(LanguageModel(VOCAB, Backbone(layers)))


@functools.cache
def small():
    """Return a smaller model, and its parameters."""
    return with_params(LanguageModel(VOCAB, Backbone(LRU(4), mlp_ratio=0)), seed=1)


def leaves(tree):
    """Return the arrays of a state, flags as numbers."""
    return [x.astype(float) if x.dtype == bool else x for x in jax.tree.leaves(tree)]


def prompts(batch=3, length=21, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)))


def greedy_loop(model, params, prompt, count, stop_tokens=()):
    """Return the most likely tokens of one row, by `apply` and repeated `step`, and the state."""
    logits, state = jax.jit(model.apply)(params, prompt[None])
    step, logits, tokens = jax.jit(model.step), logits[:, -1], []
    for index in range(count):
        if index:
            logits, state = step(params, np.array([tokens[-1]], np.int32), state)
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in stop_tokens:
            break
    return tokens, state
