"""Prefill: a model reads whole prompts in parallel, in chunks of bounded memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks
from seqjax.layers._base import Layer
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree

Result = tuple[jax.Array, PyTree]


def prefill(
    model: Layer,
    params: PyTree,
    tokens: jax.Array,
    state: PyTree = None,
    *,
    lengths: jax.Array | None = None,
    chunk_size: int = 512,
) -> Result:
    """Read prompts and return the logits after their last tokens, and the state there.

    Equal to `model.apply` on each row alone, and to reading the prompt in several calls. Memory
    grows with `chunk_size`, not with the length of the prompts. With `lengths`, each row is read in
    pieces of 512, 64, 16, 4 and 1 tokens (at most `chunk_size`), so no padding passes through the
    state, and a row's numbers do not depend on the other rows.

    Args:
      model: a `LanguageModel`, or any causal layer that maps tokens [B, T] to logits [B, T, V].
      params: the model's parameters.
      tokens: [B, P] integers; with `lengths`, row b is `tokens[b, :lengths[b]]`.
      state: the state before the prompts; by default the initial state.
      lengths: [B] integers from 1 to P; by default all rows have P tokens.
      chunk_size: largest number of tokens that one call of the model reads.

    Returns:
      `(logits, state)`: [B, V] after the last token of each row, and the state after it.

    Raises:
      ValueError: if tokens, lengths or chunk_size have the wrong shape, dtype or range.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> model = seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(8)))
      >>> params = model.init(jax.random.key(0))
      >>> prompts = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
      >>> logits, state = seqjax.prefill(model, params, prompts, lengths=jnp.array([4, 2]))
      >>> logits.shape
      (2, 7)
    """
    tokens, lengths = check_prompt("prefill", model, tokens, lengths, chunk_size)
    return _prefill(model, chunk_size, params, tokens, state, lengths)


def check_prompt(
    name: str, model: Any, tokens: Any, lengths: Any, chunk_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """Return tokens and lengths as int32 arrays; raise ValueError if they are not valid."""
    if not isinstance(model, Layer) or not model.causal:
        got = repr(model) if isinstance(model, Layer) else type(model).__name__
        raise ValueError(
            f"{name}: `model` must be a causal seqjax model, got {got}; the order of arguments is"
            " (model, params, prompt)."
        )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{name}: `chunk_size` must be an integer >= 1, got {chunk_size!r}.")
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name}: the prompt must be integers of shape [B, P] with B, P >= 1, got"
            f" {tokens.dtype.name} of shape {list(tokens.shape)}."
        )
    vocab = getattr(model, "vocab_size", None)
    concrete = not isinstance(tokens, jax.core.Tracer) and tokens.is_fully_addressable
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        if lengths.shape != tokens.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"{name}: `lengths` must be integers of shape [{len(tokens)}], got"
                f" {lengths.dtype.name} of shape {list(lengths.shape)}."
            )
        if not isinstance(lengths, jax.core.Tracer) and lengths.is_fully_addressable:
            values = np.asarray(lengths)
            if (values < 1).any() or (values > tokens.shape[1]).any():
                raise ValueError(
                    f"{name}: `lengths` must be from 1 to {tokens.shape[1]}, got {values.tolist()}."
                )
        else:
            concrete = False
        lengths = lengths.astype(jnp.int32)
    if concrete and vocab is not None:
        inside = None if lengths is None else np.arange(tokens.shape[1]) < lengths[:, None]
        _checks.in_vocabulary(model, tokens, vocab, inside)
    return tokens.astype(jnp.int32), lengths


def by_batch(arguments: Any, out: Any) -> PyTree:
    """Return specs that split every result along the batch, as the prompt is."""
    batch = explicit_mesh.spec_of(arguments["tokens"])[0]

    def of_result(x: jax.Array) -> Any:
        entries = (batch, *(None,) * (x.ndim - 1)) if x.ndim else ()
        return explicit_mesh.joined(*entries)

    return jax.tree.map(of_result, out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    model: Layer,
    chunk_size: int,
    params: PyTree,
    tokens: jax.Array,
    state: PyTree,
    lengths: jax.Array | None,
) -> Result:
    @explicit_mesh.auto_inside(by_batch)
    def run(params: PyTree, tokens: jax.Array, state: PyTree, lengths: Any) -> Result:
        return read(model, params, tokens, state, lengths, chunk_size)

    return run(params, tokens, state, lengths)


def read(
    model: Any,
    params: PyTree,
    tokens: jax.Array,
    state: PyTree,
    lengths: jax.Array | None,
    chunk_size: int,
) -> Result:
    """Compute `prefill` on checked arguments, inside `jax.jit`."""
    if state is None:
        state = model.initial_state(len(tokens))
    if lengths is None:
        return _read_equal(model, params, tokens, state, chunk_size)
    return _read_ragged(model, params, tokens, state, lengths, chunk_size)


def _read_equal(
    model: Any, params: PyTree, tokens: jax.Array, state: PyTree, chunk_size: int
) -> Result:
    batch, length = tokens.shape
    last = length % chunk_size or min(chunk_size, length)
    chunks = tokens[:, : length - last].reshape(batch, -1, min(chunk_size, length))

    def chunk(state: PyTree, tokens: jax.Array) -> tuple[PyTree, None]:
        return model.apply(params, tokens, state)[1], None

    if chunks.shape[1]:
        state, _ = jax.lax.scan(chunk, state, jnp.moveaxis(chunks, 1, 0))
    logits, state = model.apply(params, tokens[:, length - last :], state)
    return logits[:, -1], state


def piece_sizes(length: int, chunk_size: int) -> list[int]:
    """Return the sizes of the pieces of ragged prompts, in decreasing order, down to 1.

    Every size is a program to compile. A row needs at most three pieces of each size below 64.
    """
    largest = min(length, chunk_size)
    sizes = [size for size in (512, 64, 16, 4, 1) if size <= largest]
    return [largest, *sizes] if largest > 512 else sizes


def _read_ragged(
    model: Any,
    params: PyTree,
    tokens: jax.Array,
    state: PyTree,
    lengths: jax.Array,
    chunk_size: int,
) -> Result:
    """Read the rows in pieces; a row that needs no piece of a size keeps its state."""
    batch, length = tokens.shape
    spec = jax.eval_shape(lambda: model.apply(params, tokens[:, :1], state)[0])
    carry = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, spec.shape[-1]), spec.dtype), state

    def by_size(size: int, carry: Any) -> Any:
        def needed(carry: Any) -> jax.Array:
            return jnp.any(lengths - carry[0] >= size)

        def piece(carry: Any) -> Any:
            start, logits, state = carry
            active = lengths - start >= size
            where = start[:, None] + jnp.arange(size, dtype=jnp.int32)
            taken = jnp.take_along_axis(tokens, jnp.minimum(where, length - 1), axis=1)
            # Rows that are not active read token 0, which every vocabulary has.
            taken = jnp.where(active[:, None], taken, 0)
            new_logits, new_state = model.apply(params, taken, state)
            return (
                jnp.where(active, start + size, start),
                jnp.where(active[:, None], new_logits[:, -1], logits),
                select_rows(active, new_state, state),
            )

        return jax.lax.while_loop(needed, piece, carry)

    for size in piece_sizes(length, chunk_size):
        carry = by_size(size, carry)
    return carry[1], carry[2]


def select_rows(rows: jax.Array, chosen: PyTree, other: PyTree) -> PyTree:
    """Return `chosen` where `rows` [B] is True, else `other`, for trees of arrays [B, ...]."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b), chosen, other
    )
