"""Speculative decoding: a small model proposes tokens, a large model checks them in parallel."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqjax.generation import prompts
from seqjax.generation.arguments import Arrays, check, check_model, check_prompt, positive
from seqjax.generation.sampling import Sampling, filtered
from seqjax.layers._base import Layer
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree


class Speculation(NamedTuple):
    """Results of speculative decoding.

    Attributes:
      tokens: [B, N] int32; after the end of a row the tokens are 0.
      lengths: [B] int32, number of tokens of each row, with its stop token.
      logprobs: [B, N], log-probability of each token under the target.
      rounds: [B] int32, number of passes of the target in which the row took part. Without
        speculation a row would need as many passes as it has tokens.
      state: the target's state after all tokens except the last.
      draft_state: the draft's state at the same position.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array
    rounds: jax.Array
    state: PyTree
    draft_state: PyTree


def speculate(
    target: Layer,
    draft: Layer,
    target_params: PyTree,
    draft_params: PyTree,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    key: jax.Array | None = None,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    stop_tokens: int | Sequence[int] = (),
    lengths: jax.Array | None = None,
    chunk_size: int = 512,
) -> Speculation:
    """Generate tokens with the distribution of `target`, with fewer passes of it.

    In each round the draft proposes k tokens d_1 .. d_k, one a step, with probabilities q. The
    target reads them in one parallel pass, with probabilities p. Token d_j is accepted with
    probability min(1, p(d_j) / q(d_j)). The first rejected token is replaced by a draw from the
    positive part of p - q, and after k accepted tokens the target adds one (arXiv 2211.17192). The
    tokens therefore have exactly the distribution of `generate` with the target.

    After a rejection the target's state is computed again from the state at the start of the round:
    storing the state after every token would take k + 1 times the memory, and read the weights in
    k + 1 steps. On CPU, where weights fit the cache, a round with stored states takes 0.56 to 1.00
    times as long (`experiments.bench speculate`). The draft runs step by step anyway and keeps the
    states of one round.

    Args:
      target, draft: language models with the same vocabulary.
      target_params, draft_params: the parameters of both.
      prompt, max_new_tokens, key: as in `generate`.
      draft_tokens: k, number of tokens that the draft proposes in a round.
      temperature, top_k, top_p, min_p: as in `generate`, for both models.
      stop_tokens, lengths, chunk_size: as in `generate`.

    Returns:
      A `Speculation`.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or range, or the vocabularies differ.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> def make(dim):
      ...     return seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(dim)))
      >>> target, draft = make(16), make(8)
      >>> params = target.init(jax.random.key(0)), draft.init(jax.random.key(1))
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> out = seqjax.speculate(
      ...     target, draft, *params, prompt, max_new_tokens=6, key=jax.random.key(2)
      ... )
      >>> out.tokens.shape
      (1, 6)
    """
    chunk_size, max_new_tokens, draft_tokens = positive(
        "speculate",
        chunk_size=chunk_size,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
    )
    order = "(target, draft, target_params, draft_params, prompt)"
    for argument, model in (("target", target), ("draft", draft)):
        check_model("speculate", model, argument, order)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    arrays = check("speculate", target, prompt, key, sampling, stop_tokens, lengths)
    check_prompt("speculate", draft, prompt, lengths)
    vocabularies = [getattr(model, "vocab_size", None) for model in (target, draft)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            "speculate: `target` and `draft` must have the same vocab_size, got"
            f" {vocabularies[0]} and {vocabularies[1]}."
        )
    sizes = chunk_size, max_new_tokens, draft_tokens
    return _speculate((target, draft), sizes, (target_params, draft_params), arrays)


class _Carry(NamedTuple):
    round: jax.Array
    token: jax.Array  # [B], the last token, which neither model has read
    states: tuple[PyTree, PyTree]
    done: jax.Array
    lengths: jax.Array
    rounds: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _speculate(
    models: tuple[Layer, Layer], sizes: tuple[int, int, int], params: PyTree, arrays: Arrays
) -> Speculation:
    def specs(arguments: Any, out: Any) -> PyTree:
        return prompts.by_batch({"tokens": arguments["arrays"].tokens}, out)

    @explicit_mesh.auto_inside(specs)
    def run(params: PyTree, arrays: Arrays) -> Speculation:
        return _compute(*models, *sizes, params, arrays)

    return run(params, arrays)


def _probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the probabilities [B, V] that a row draws from; one token's is 1 for temperature 0."""
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    temperature = jnp.broadcast_to(sampling.temperature, logits.shape[:1])[:, None]
    return jnp.where(temperature > 0, jax.nn.softmax(filtered(logits, sampling)), best)


def _draw(keys: jax.Array | None, probabilities: jax.Array) -> jax.Array:
    """Draw a token of each row; without keys the probabilities are 0 and 1."""
    if keys is None:
        return jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    logits = jnp.log(probabilities)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _compute(
    target: Any,
    draft: Any,
    chunk_size: int,
    count: int,
    k: int,
    params: tuple[PyTree, PyTree],
    arrays: Arrays,
) -> Speculation:
    sampling, batch = arrays.sampling, len(arrays.tokens)
    rows = jnp.arange(batch)

    def keys_of(index: Any, purpose: Any) -> jax.Array | None:
        if arrays.keys is None:
            return None
        keys = jax.vmap(jax.random.fold_in, (0, None))(arrays.keys, index)
        return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)

    def is_stop(tokens: jax.Array) -> jax.Array:
        return jnp.any(tokens[..., None] == arrays.stop_tokens, axis=-1)

    def read(index: int, model: Any) -> tuple[jax.Array, PyTree]:
        return prompts.read(model, params[index], arrays.tokens, None, arrays.lengths, chunk_size)

    (logits, target_state), (_, draft_state) = read(0, target), read(1, draft)
    token = _draw(keys_of(0, 0), _probabilities(logits, sampling))
    logprob = jax.nn.log_softmax(logits)[rows, token]
    start = _Carry(
        jnp.int32(1),
        token,
        (target_state, draft_state),
        is_stop(token),
        jnp.ones(batch, jnp.int32),
        jnp.ones(batch, jnp.int32),
        jnp.zeros((batch, count), jnp.int32).at[:, 0].set(token),
        jnp.zeros((batch, count), logprob.dtype).at[:, 0].set(logprob),
    )

    def propose(carry: _Carry) -> tuple[jax.Array, jax.Array, PyTree]:
        """Return the proposals [k, B], their probabilities [k, B, V], and k + 1 draft states."""

        def one(inner: Any, j: jax.Array) -> Any:
            token, state = inner
            logits, state = draft.step(params[1], token, state)
            q = _probabilities(logits, sampling)
            proposed = _draw(keys_of(carry.round, 3 + j), q)
            return (proposed, state), (proposed, q, state)

        # The last step reads the last proposal; its own proposal is not used.
        inner = carry.token, carry.states[1]
        _, (proposed, q, states) = jax.lax.scan(one, inner, jnp.arange(k + 1, dtype=jnp.int32))
        return proposed[:k], q[:k], states

    def body(carry: _Carry) -> _Carry:
        proposed, q, draft_states = propose(carry)
        read_tokens = jnp.concatenate([carry.token[None], proposed]).T  # [B, k + 1]
        logits, whole_state = target.apply(params[0], read_tokens, carry.states[0])
        p = jax.vmap(lambda z: _probabilities(z, sampling), 1)(logits)  # [k + 1, B, V]

        def at(probabilities: jax.Array) -> jax.Array:
            return jnp.take_along_axis(probabilities, proposed[..., None], axis=-1)[..., 0]

        keys = keys_of(carry.round, 1)
        uniform = jnp.full((k, batch), 0.5)
        if keys is not None:
            uniform = jax.vmap(lambda key: jax.random.uniform(key, (k,)), out_axes=1)(keys)
        accepted = uniform * at(q) < at(p[:k])
        n = jnp.sum(jnp.cumprod(accepted, axis=0), axis=0)  # accepted before the first rejection
        q_or_zero = jnp.concatenate([q, jnp.zeros_like(q[:1])])
        rest = jnp.maximum(p[n, rows] - q_or_zero[n, rows], 0)
        # If p equals q up to rounding, nothing remains, and p itself is the distribution.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p[n, rows])
        extra = _draw(keys_of(carry.round, 2), rest)
        column = jnp.arange(k + 1, dtype=n.dtype)
        padded = jnp.concatenate([proposed, extra[None]]).T
        new = jnp.where(column == n[:, None], extra[:, None], padded)  # [B, k + 1]

        # A row keeps its tokens up to a stop token, and up to `count` in all.
        before_stop = jnp.cumsum(is_stop(new), axis=1) - is_stop(new) == 0
        kept = (column <= n[:, None]) & before_stop & (carry.lengths[:, None] + column < count)
        kept &= ~carry.done[:, None]
        m = jnp.sum(kept, axis=1).astype(jnp.int32)
        where = jnp.where(kept, carry.lengths[:, None] + column, count)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), new[..., None], -1)[..., 0]
        last = jnp.take_along_axis(new, jnp.maximum(m - 1, 0)[:, None], axis=1)[:, 0]
        lengths = carry.lengths + m
        return _Carry(
            carry.round + 1,
            jnp.where(m > 0, last, carry.token),
            (
                state_after(target, params[0], read_tokens, carry.states[0], whole_state, m),
                stored_state(draft_states, carry.states[1], m),
            ),
            carry.done | jnp.any(kept & is_stop(new), axis=1) | (lengths >= count),
            lengths,
            carry.rounds + (m > 0),
            carry.tokens.at[rows[:, None], where].set(new, mode="drop"),
            carry.logprobs.at[rows[:, None], where].set(logprobs, mode="drop"),
        )

    start = start._replace(done=start.done | (start.lengths >= count))
    end = jax.lax.while_loop(lambda carry: ~jnp.all(carry.done), body, start)
    return Speculation(end.tokens, end.lengths, end.logprobs, end.rounds, *end.states)


def state_after(
    model: Any, params: PyTree, tokens: jax.Array, before: PyTree, whole: PyTree, m: jax.Array
) -> PyTree:
    """Return the state after the first `m` [B] tokens, from the state before them."""
    length = tokens.shape[1]

    def again(before: PyTree) -> PyTree:
        return prompts.read(model, params, tokens, before, m, length)[1]

    return jax.lax.cond(jnp.all(m == length), lambda _: whole, again, before)


def stored_state(states: PyTree, before: PyTree, m: jax.Array) -> PyTree:
    """Return the state after `m` [B] tokens, of the states after 1, 2, ... tokens."""
    rows = jnp.arange(len(m))
    chosen = jax.tree.map(lambda leaf: leaf[jnp.maximum(m - 1, 0), rows], states)
    return prompts.select_rows(m > 0, chosen, before)
