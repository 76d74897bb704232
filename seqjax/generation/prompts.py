"""Prefill: a model reads whole prompts in parallel, in chunks of bounded memory."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.generation.arguments import check_model, check_prompt, positive
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
    donate_state: bool = False,
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
      donate_state: whether the returned state may take the memory of `state`, whose arrays are
        deleted.
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
    [chunk_size] = positive("prefill", chunk_size=chunk_size)
    check_model("prefill", model)
    arrays = check_prompt("prefill", model, tokens, lengths)
    return _prefill(model, chunk_size, params, state, arrays, donate_state=donate_state)


def jit_with_donation(run: Any) -> Any:
    """Compile `run(model, sizes, params, state, arrays)`, which returns the new state.

    The first two arguments are static. With `donate_state`, the results may take the memory of
    `state`.
    """
    keep = jax.jit(run, static_argnums=(0, 1))
    reuse = jax.jit(run, static_argnums=(0, 1), donate_argnums=3)

    def compiled(*args: Any, donate_state: bool) -> Any:
        return (reuse if donate_state else keep)(*args)

    return compiled


def by_batch(arguments: Any, out: Any) -> PyTree:
    """Return specs that split every result along the batch, as the prompt is."""
    batch = explicit_mesh.spec_of(arguments["tokens"])[0]

    def of_result(x: jax.Array) -> Any:
        entries = (batch, *(None,) * (x.ndim - 1)) if x.ndim else ()
        return explicit_mesh.joined(*entries)

    return jax.tree.map(of_result, out)


@jit_with_donation
def _prefill(
    model: Layer,
    chunk_size: int,
    params: PyTree,
    state: PyTree,
    arrays: tuple[jax.Array, jax.Array | None],
) -> Result:
    @explicit_mesh.auto_inside(by_batch)
    def run(params: PyTree, tokens: jax.Array, state: PyTree, lengths: Any) -> Result:
        return read(model, params, tokens, state, lengths, chunk_size)

    return run(params, arrays[0], state, arrays[1])


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
