"""Decoding on the device: `generate` in one program, `stream` in groups of tokens."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.generation import prompts
from seqjax.generation.arguments import Arrays, check, positive
from seqjax.generation.sampling import Sampling, choose
from seqjax.layers._base import Layer
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree


class Generation(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: [B, N] int32; after the end of a row the tokens are 0.
      lengths: [B] int32, number of tokens of each row, with its stop token.
      logprobs: [B, N], log-probability of each token under the model, without temperature and
        filters; 0 after the end of a row.
      state: the state after the prompt and all generated tokens except the last. Continue with the
        last token as the start of the next prompt.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array
    state: PyTree


class Decoding(NamedTuple):
    """The carry of the loop over tokens.

    Attributes:
      position: number of generated tokens.
      token: [B], the last token, which the model has not read yet.
      state: the state before `token`.
      done: [B] bool, True for rows that have generated a stop token.
      seen: [B, V] bool, tokens that occurred, or None without a repetition penalty.
      lengths: [B], number of tokens of each row.
    """

    position: jax.Array
    token: jax.Array
    state: PyTree
    done: jax.Array
    seen: jax.Array | None
    lengths: jax.Array


def generate(
    model: Layer,
    params: PyTree,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    stop_tokens: int | Sequence[int] = (),
    state: PyTree = None,
    donate_state: bool = False,
    lengths: jax.Array | None = None,
    chunk_size: int = 512,
) -> Generation:
    """Continue prompts with tokens from a language model.

    The model reads the prompts in parallel (`prefill`) and then generates one token a step in a
    loop on the device, until every row has a stop token or `max_new_tokens` tokens. The state has a
    constant size for recurrent layers. Prefill and loop are one compiled program, which calls with
    other values of the arguments reuse.

    Args:
      model: a `LanguageModel`, or any causal layer that maps tokens to logits.
      params: the model's parameters.
      prompt: [B, P] integers, P >= 1.
      max_new_tokens: largest number N of tokens to generate, at least 1.
      key: a `jax.random` key, or [B] keys, one for each row. With one key per row, a row's tokens
        do not depend on the other rows. Required unless `temperature` is the number 0.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k, top_p, min_p, repetition_penalty: filters, off by default; see `Sampling`.
      stop_tokens: token or tokens that end a row.
      state: the state before the prompt, from an earlier call; by default the initial state.
      donate_state: whether the returned state may take the memory of `state`, whose arrays are
        deleted. Without it, memory must hold both.
      lengths: [B] lengths of the prompts, if they differ; row b is `prompt[b, :lengths[b]]`.
      chunk_size: largest number of tokens of the prompt that one call of the model reads.

    `temperature` and the filters are numbers, or arrays [B] with a value for each row.

    Returns:
      A `Generation`.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or range.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> model = seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(8)))
      >>> params = model.init(jax.random.key(0))
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> out = seqjax.generate(model, params, prompt, max_new_tokens=5, temperature=0)
      >>> out.tokens.shape, out.lengths.tolist()
      ((1, 5), [5])
    """
    chunk_size, max_new_tokens = positive(
        "generate", chunk_size=chunk_size, max_new_tokens=max_new_tokens
    )
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    arrays = check("generate", model, prompt, key, sampling, stop_tokens, lengths)
    sizes = chunk_size, max_new_tokens
    return _generate(model, sizes, params, state, arrays, donate_state=donate_state)


def stream(
    model: Layer,
    params: PyTree,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    group_size: int = 8,
    key: jax.Array | None = None,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    stop_tokens: int | Sequence[int] = (),
    state: PyTree = None,
    donate_state: bool = False,
    lengths: jax.Array | None = None,
    chunk_size: int = 512,
) -> Iterator[Generation]:
    """Yield the tokens of `generate` in groups, for interactive use.

    Joined along the second axis, the groups are the tokens that `generate` returns. The device
    computes the next group while the caller handles a group.

    Args:
      model, params, prompt, max_new_tokens, key: as in `generate`.
      group_size: number of tokens in a group after the first, which has one token.
      temperature, top_k, top_p, min_p, repetition_penalty: as in `generate`.
      stop_tokens, state, donate_state, lengths, chunk_size: as in `generate`.

    Returns:
      An iterator with a `Generation` for each group: the group's tokens and logprobs
      [B, <= group_size], the number of the group's tokens in each row, and the state.

    Raises:
      ValueError: as `generate`.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> model = seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(8)))
      >>> params = model.init(jax.random.key(0))
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> groups = seqjax.stream(
      ...     model, params, prompt, max_new_tokens=5, group_size=2, temperature=0
      ... )
      >>> [group.tokens.shape for group in groups]
      [(1, 1), (1, 2), (1, 2)]
    """
    chunk_size, max_new_tokens, group_size = positive(
        "stream", chunk_size=chunk_size, max_new_tokens=max_new_tokens, group_size=group_size
    )
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    arrays = check("stream", model, prompt, key, sampling, stop_tokens, lengths)
    begun = _begin(model, chunk_size, params, state, arrays, donate_state=donate_state)
    return _groups(model, max_new_tokens, group_size, params, begun, arrays)


def begin(
    model: Any, chunk_size: int, params: PyTree, state: PyTree, arrays: Arrays
) -> tuple[Decoding, jax.Array]:
    """Read the prompts and choose the first token; return the carry and its log-probability."""
    logits, state = prompts.read(model, params, arrays.tokens, state, arrays.lengths, chunk_size)
    batch, vocab = logits.shape
    seen = None
    if arrays.sampling.repetition_penalty is not None:
        length = arrays.tokens.shape[1]
        lengths = length if arrays.lengths is None else arrays.lengths[:, None]
        inside = jnp.arange(length, dtype=jnp.int32) < lengths
        # Padding is counted as token `vocab`, which is dropped.
        tokens = jnp.where(inside, arrays.tokens, vocab)
        seen = jnp.zeros((batch, vocab), jnp.bool_)
        seen = seen.at[jnp.arange(batch)[:, None], tokens].set(True, mode="drop")
    zeros = jnp.zeros(batch, jnp.int32)
    start = Decoding(jnp.int32(0), zeros, state, zeros > 0, seen, zeros)
    return extend(start, logits, arrays)


def extend(decoding: Decoding, logits: jax.Array, arrays: Arrays) -> tuple[Decoding, jax.Array]:
    """Choose the next token from the logits; return the new carry and the log-probability."""
    position, _, state, done, seen, lengths = decoding
    keys = arrays.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    token, logprob = choose(keys, logits, seen, arrays.sampling)
    token, logprob = jnp.where(done, 0, token), jnp.where(done, 0, logprob)
    lengths = jnp.where(done, lengths, lengths + 1)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(~done)
    ended = jnp.any(token[:, None] == arrays.stop_tokens, axis=1)
    return Decoding(position + 1, token, state, done | ended, seen, lengths), logprob


def advance(
    model: Any, params: PyTree, decoding: Decoding, arrays: Arrays
) -> tuple[Decoding, jax.Array]:
    """Read the last token of all rows, and choose the next one of those that are not done."""
    logits, state = model.step(params, decoding.token, decoding.state)
    return extend(decoding._replace(state=state), logits, arrays)


def fill(
    model: Any,
    params: PyTree,
    decoding: Decoding,
    tokens: jax.Array,
    logprobs: jax.Array,
    arrays: Arrays,
    first: int,
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Generate into `tokens` and `logprobs` [B, N] from column `first`, until all rows are done.

    Rows that are done still take steps. The state of a row is stored when the row ends, and these
    steps do not change the stored state. A select of states in every step would read and write
    both states, and would prevent updates in place.
    """
    begun = decoding.position - first
    # A single row, or rows without stop tokens, end together: no state has to be stored.
    waits = len(decoding.done) > 1 and arrays.stop_tokens.size > 0

    def unfinished(carry: Any) -> jax.Array:
        decoding = carry[0]
        return (decoding.position - begun < tokens.shape[1]) & ~jnp.all(decoding.done)

    def body(carry: Any) -> Any:
        before, tokens, logprobs, ended = carry
        column = before.position - begun
        decoding, logprob = advance(model, params, before, arrays)
        if waits:
            now = decoding.done & ~before.done
            ended = jax.lax.cond(
                jnp.any(now),
                lambda ended: prompts.select_rows(now, decoding.state, ended),
                lambda ended: ended,
                ended,
            )

        def put(array: jax.Array, values: jax.Array) -> jax.Array:
            # A scatter, `.at[:, column].set`, is a loop over the rows on CPU.
            values = values[:, None].astype(array.dtype)
            return jax.lax.dynamic_update_slice_in_dim(array, values, column, axis=1)

        return decoding, put(tokens, decoding.token), put(logprobs, logprob), ended

    start = decoding, tokens, logprobs, decoding.state if waits else None
    decoding, tokens, logprobs, ended = jax.lax.while_loop(unfinished, body, start)
    if waits:
        state = prompts.select_rows(decoding.done, ended, decoding.state)
        decoding = decoding._replace(state=state)
    return decoding, tokens, logprobs


@prompts.jit_with_donation
def _generate(
    model: Layer,
    sizes: tuple[int, int],
    params: PyTree,
    state: PyTree,
    arrays: Arrays,
) -> Generation:
    chunk_size, max_new_tokens = sizes

    def run(params: PyTree, state: PyTree, arrays: Arrays) -> Generation:
        decoding, logprob = begin(model, chunk_size, params, state, arrays)
        shape = len(decoding.token), max_new_tokens
        tokens = jnp.zeros(shape, jnp.int32).at[:, 0].set(decoding.token)
        logprobs = jnp.zeros(shape, logprob.dtype).at[:, 0].set(logprob)
        decoding, tokens, logprobs = fill(model, params, decoding, tokens, logprobs, arrays, 1)
        return Generation(tokens, decoding.lengths, logprobs, decoding.state)

    return _on_any_mesh(run)(params, state, arrays)


def _on_any_mesh(run: Any) -> Any:
    def specs(arguments: Any, out: Any) -> PyTree:
        return prompts.by_batch({"tokens": arguments["arrays"].tokens}, out)

    return explicit_mesh.auto_inside(specs)(run)


@prompts.jit_with_donation
def _begin(
    model: Layer, chunk_size: int, params: PyTree, state: PyTree, arrays: Arrays
) -> tuple[Decoding, jax.Array]:
    def run(params: PyTree, state: PyTree, arrays: Arrays) -> tuple[Decoding, jax.Array]:
        return begin(model, chunk_size, params, state, arrays)

    return _on_any_mesh(run)(params, state, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _group(
    model: Layer, size: int, params: PyTree, decoding: Decoding, arrays: Arrays
) -> tuple[Decoding, jax.Array, jax.Array]:
    def run(
        params: PyTree, decoding: Decoding, arrays: Arrays
    ) -> tuple[Decoding, jax.Array, jax.Array]:
        shape = len(decoding.token), size
        tokens, logprobs = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        return fill(model, params, decoding, tokens, logprobs, arrays, 0)

    return _on_any_mesh(run)(params, decoding, arrays)


def _groups(
    model: Layer,
    count: int,
    size: int,
    params: PyTree,
    begun: tuple[Decoding, jax.Array],
    arrays: Arrays,
) -> Iterator[Generation]:
    decoding, logprob = begun
    ready = Generation(decoding.token[:, None], decoding.lengths, logprob[:, None], decoding.state)
    made = 1
    while made < count:
        before, number = decoding.lengths, min(size, count - made)
        decoding, tokens, logprobs = _group(model, number, params, decoding, arrays)
        yield ready
        # Dispatched above; reading `done` here overlaps with the caller's work on `ready`.
        ready = Generation(tokens, decoding.lengths - before, logprobs, decoding.state)
        made += number
        if not np.asarray(ready.lengths).any():
            return
    yield ready
