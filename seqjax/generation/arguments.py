"""Checks of the arguments of generation: models, prompts, keys, sizes and stop tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.generation.sampling import Sampling, as_array
from seqjax.layers import _checks
from seqjax.layers._base import Layer
from seqjax.models.classifier import Classifier

ORDER = "(model, params, prompt)"
INT32 = np.iinfo(np.int32)


class Arrays(NamedTuple):
    """Checked arrays of a call."""

    tokens: jax.Array
    lengths: jax.Array | None
    keys: jax.Array | None
    sampling: Sampling
    stop_tokens: jax.Array


def check(
    name: str,
    model: Any,
    prompt: Any,
    key: Any,
    sampling: Sampling,
    stop_tokens: int | Sequence[int],
    lengths: Any,
) -> Arrays:
    """Return the arguments as arrays; raise ValueError if they are not valid."""
    check_model(name, model)
    tokens, lengths = check_prompt(name, model, prompt, lengths)
    batch = len(tokens)
    stops = _check_stop_tokens(name, stop_tokens, getattr(model, "vocab_size", None))
    keys = None if sampling.greedy else _row_keys(name, key, batch)
    return Arrays(tokens, lengths, keys, sampling.check(name, batch), stops)


def positive(name: str, **given: Any) -> list[int]:
    """Return the values as integers; raise ValueError unless they are integers >= 1."""
    for field, value in given.items():
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not integer or value < 1:
            raise ValueError(f"{name}: `{field}` must be an integer >= 1, got {value!r}.")
    return [int(value) for value in given.values()]


def check_model(name: str, model: Any, argument: str = "model", order: str = ORDER) -> None:
    """Raise unless `model` is a causal layer."""
    if not isinstance(model, Layer) or not model.causal:
        got = repr(model) if isinstance(model, Layer) else type(model).__name__
        raise ValueError(
            f"{name}: `{argument}` must be a causal seqjax model, got {got}; the order of arguments"
            f" is {order}."
        )
    if isinstance(model, Classifier):
        raise ValueError(
            f"{name}: `{argument}` must be a language model, with logits for every token, got a"
            " Classifier; use LanguageModel."
        )


def check_prompt(
    name: str, model: Any, tokens: Any, lengths: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Return tokens and lengths as int32 arrays; raise ValueError if they are not valid."""
    array = as_integers(tokens)
    if array is None or array.ndim != 2 or 0 in array.shape:
        got = describe(tokens)
        if array is not None and array.ndim == 1:
            got += "; add the batch axis: prompt[None]"
        elif as_array(tokens) is None and isinstance(tokens, list | tuple):
            got += "; pad the rows to one length and pass `lengths`"
        raise ValueError(
            f"{name}: the prompt must be integers of shape [B, P] with B, P >= 1, got {got}."
        )
    vocab = getattr(model, "vocab_size", None)
    concrete = not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
    if lengths is not None:
        given, lengths = lengths, as_integers(lengths)
        if lengths is None or lengths.shape != array.shape[:1]:
            raise ValueError(
                f"{name}: `lengths` must be integers of shape [{len(array)}], got"
                f" {describe(given)}."
            )
        if not isinstance(lengths, jax.core.Tracer) and lengths.is_fully_addressable:
            values = np.asarray(lengths)
            if (values < 1).any() or (values > array.shape[1]).any():
                raise ValueError(
                    f"{name}: `lengths` must be from 1 to {array.shape[1]}, got {values.tolist()}."
                )
        else:
            concrete = False
    if concrete and vocab is not None:
        inside = None if lengths is None else np.arange(array.shape[1]) < lengths[:, None]
        _checks.in_vocabulary(model, array, vocab, inside)
    return array, lengths


def _check_stop_tokens(name: str, stop_tokens: Any, vocab: int | None) -> jax.Array:
    """Return the stop tokens [S]."""
    array = as_array(stop_tokens)
    empty = array is not None and array.size == 0  # of any dtype: that of np.array([]) is float64
    stops = jnp.zeros(0, jnp.int32) if empty else as_integers(stop_tokens)
    if stops is None or stops.ndim > 1:
        raise ValueError(
            f"{name}: `stop_tokens` must be a token or a list of tokens, got {stop_tokens!r}."
        )
    if vocab is not None and not isinstance(stops, jax.core.Tracer):
        values = np.asarray(stops)
        if ((values < 0) | (values >= vocab)).any():
            raise ValueError(
                f"{name}: `stop_tokens` must be from 0 to vocab_size - 1 = {vocab - 1}, got"
                f" {values.tolist()}."
            )
    return stops.reshape(-1)


def _row_keys(name: str, key: Any, batch: int) -> jax.Array:
    """Return a key for each row: the given keys, or the split of one key."""
    if key is None:
        raise ValueError(
            f"{name}: `key` must be a jax.random key, got None; make one with jax.random.key(0), or"
            " pass temperature=0 for the most likely tokens."
        )
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{name}: `key` must be a jax.random key, got {describe(key)}; make one with"
            " jax.random.key(0)."
        )
    if key.shape == ():
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise ValueError(
            f"{name}: `key` must be one key or have shape [{batch}], got {list(key.shape)}."
        )
    return key


def as_integers(value: Any) -> jax.Array | None:
    """Return the value as an int32 array, or None if it has other elements than integers."""
    array = as_array(value)
    if array is None or not jnp.issubdtype(array.dtype, jnp.integer):
        return None
    traced = isinstance(array, jax.core.Tracer)
    known = isinstance(array, np.ndarray) or (not traced and array.is_fully_addressable)
    if known and array.dtype.itemsize >= 4 and array.dtype != jnp.int32:
        values = np.asarray(array)
        if ((values < INT32.min) | (values > INT32.max)).any():
            return None  # a conversion would wrap around
    return jnp.asarray(array).astype(jnp.int32)


def describe(value: Any) -> str:
    """Return a number itself, an array's dtype and shape, or the name of the type."""
    if isinstance(value, bool | int | float):
        return repr(value)
    array = as_array(value)
    if array is None:
        return type(value).__name__
    return f"{array.dtype.name} of shape {list(array.shape)}"
