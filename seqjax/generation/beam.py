"""Beam search: the most likely continuations, over the tree of states."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.generation import prompts
from seqjax.generation.arguments import check, positive
from seqjax.generation.sampling import Sampling
from seqjax.layers._base import Layer
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree


class Beams(NamedTuple):
    """Results of a beam search, best first.

    Attributes:
      tokens: [B, W, N] int32; after the end of a beam the tokens are 0.
      lengths: [B, W] int32, number of tokens with the stop token.
      scores: [B, W], sum of the log-probabilities over lengths^length_penalty.
      state: tree of arrays [B, W, ...], the state after all tokens except the last.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    state: PyTree


def beam_search(
    model: Layer,
    params: PyTree,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    stop_tokens: int | Sequence[int] = (),
    state: PyTree = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 512,
) -> Beams:
    """Search for the continuations with the largest log-probability.

    Each step extends all W beams of a row by all tokens and keeps the W best. A beam that has a
    stop token keeps its score and competes with the others. One beam is greedy decoding.

    Args:
      model, params, prompt, max_new_tokens: as in `generate`.
      num_beams: W, at most the size of the vocabulary.
      length_penalty: exponent of the length in the final scores; 0 compares sums, 1 compares means.
      stop_tokens, state, lengths, chunk_size: as in `generate`.

    Returns:
      `Beams`, sorted by score.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or range.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> model = seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(8)))
      >>> params = model.init(jax.random.key(0))
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> beams = seqjax.beam_search(model, params, prompt, max_new_tokens=4, num_beams=3)
      >>> beams.tokens.shape
      (1, 3, 4)
    """
    chunk_size, max_new_tokens, num_beams = positive(
        "beam_search", chunk_size=chunk_size, max_new_tokens=max_new_tokens, num_beams=num_beams
    )
    arrays = check(
        "beam_search", model, prompt, None, Sampling(temperature=0), stop_tokens, lengths
    )
    vocab = getattr(model, "vocab_size", None)
    if vocab is not None and num_beams > vocab:
        raise ValueError(
            f"beam_search: `num_beams` must be at most vocab_size = {vocab}, got {num_beams}."
        )
    number = isinstance(length_penalty, int | float | np.number | jax.Array)
    if not number or jnp.ndim(length_penalty):
        raise ValueError(f"beam_search: `length_penalty` must be a number, got {length_penalty!r}.")
    return _search(
        model,
        (chunk_size, max_new_tokens, num_beams),
        params,
        arrays.tokens,
        state,
        arrays.lengths,
        arrays.stop_tokens,
        jnp.float32(length_penalty),
    )


class _Carry(NamedTuple):
    position: jax.Array
    tokens: jax.Array  # [B, W, N]
    scores: jax.Array  # [B, W]
    lengths: jax.Array  # [B, W]
    done: jax.Array  # [B, W]
    state: PyTree  # leaves [B * W, ...]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
    model: Layer, sizes: tuple[int, int, int], params: PyTree, tokens: jax.Array, *rest: Any
) -> Beams:
    @explicit_mesh.auto_inside(prompts.by_batch)
    def run(params: PyTree, tokens: jax.Array, rest: Any) -> Beams:
        return _compute(model, *sizes, params, tokens, *rest)

    return run(params, tokens, rest)


def _compute(
    model: Any,
    chunk_size: int,
    steps: int,
    beams: int,
    params: PyTree,
    prompt: jax.Array,
    state: PyTree,
    prompt_lengths: jax.Array | None,
    stop_tokens: jax.Array,
    length_penalty: jax.Array,
) -> Beams:
    logits, state = prompts.read(model, params, prompt, state, prompt_lengths, chunk_size)
    batch, vocab = logits.shape
    scores, first = jax.lax.top_k(jax.nn.log_softmax(logits), beams)

    def by_beam(value: jax.Array, beams: jax.Array) -> jax.Array:
        """Take beams [B, W] of an array [B, W, ...]."""
        return jnp.take_along_axis(value, beams.reshape(*beams.shape, *(1,) * (value.ndim - 2)), 1)

    def is_stop(token: jax.Array) -> jax.Array:
        return jnp.any(token[..., None] == stop_tokens, axis=-1)

    first = first.astype(jnp.int32)
    start = _Carry(
        jnp.int32(1),
        jnp.zeros((batch, beams, steps), jnp.int32).at[:, :, 0].set(first),
        scores,
        jnp.ones((batch, beams), jnp.int32),
        is_stop(first),
        jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), state),
    )

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.position < steps) & ~jnp.all(carry.done)

    def body(carry: _Carry) -> _Carry:
        last = jax.lax.dynamic_index_in_dim(carry.tokens, carry.position - 1, 2, keepdims=False)
        logits, state = model.step(params, last.reshape(-1), carry.state)
        state = prompts.select_rows(carry.done.reshape(-1), carry.state, state)
        logprobs = jax.nn.log_softmax(logits).reshape(batch, beams, vocab)
        # A beam that is done has one continuation: token 0, with the same score.
        only = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf).astype(logprobs.dtype)
        logprobs = jnp.where(carry.done[..., None], only, logprobs)
        total = (carry.scores[..., None] + logprobs).reshape(batch, -1)
        scores, chosen = jax.lax.top_k(total, beams)
        parent, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)

        def inherit(value: jax.Array) -> jax.Array:
            return jnp.take_along_axis(
                value, parent.reshape(*parent.shape, *(1,) * (value.ndim - 2)), 1
            )

        done = inherit(carry.done)
        tokens = inherit(carry.tokens).at[:, :, carry.position].set(jnp.where(done, 0, token))
        rows = (jnp.arange(batch, dtype=parent.dtype)[:, None] * beams + parent).reshape(-1)
        return _Carry(
            carry.position + 1,
            tokens,
            scores,
            inherit(carry.lengths) + ~done,
            done | is_stop(token),
            jax.tree.map(lambda leaf: leaf[rows], state),
        )

    end = jax.lax.while_loop(unfinished, body, start)
    scores = end.scores / end.lengths.astype(end.scores.dtype) ** length_penalty
    order = jnp.argsort(-scores, axis=1)

    def ranked(value: jax.Array) -> jax.Array:
        return by_beam(value, order)

    state = jax.tree.map(lambda leaf: leaf.reshape(batch, beams, *leaf.shape[1:]), end.state)
    return Beams(
        ranked(end.tokens), ranked(end.lengths), ranked(scores), jax.tree.map(ranked, state)
    )
