"""Choice of the next token: temperature, top-k, top-p, min-p and repetition penalty."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
    """Parameters of the choice of a token, each a number, an array [B], or None for off.

    Attributes:
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: number of most likely tokens to draw from; above the vocabulary's size, all tokens.
      top_p: draw from the smallest set of most likely tokens whose probability reaches this.
      min_p: smallest probability of a token, relative to that of the most likely one.
      repetition_penalty: divisor of the positive logits, and factor of the negative logits, of
        tokens that already occurred (arXiv 1909.05858).
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None

    def check(self, name: str, batch: int) -> "Sampling":
        """Return the parameters as arrays; raise ValueError for values out of range."""

        def checked(field: str, wanted: str, low: float, high: float, low_allowed: bool) -> Any:
            value, dtype = getattr(self, field), jnp.int32 if field == "top_k" else jnp.float32
            if value is None and field != "temperature":
                return None
            array = as_array(value)
            kinds = (jnp.integer,) if field == "top_k" else (jnp.integer, jnp.floating)
            if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
                raise ValueError(f"{name}: `{field}` must be {wanted}, got {value!r}.")
            if array.shape not in ((), (batch,)):
                raise ValueError(
                    f"{name}: `{field}` must be a number or have shape [{batch}], got"
                    f" {list(array.shape)}."
                )
            if isinstance(array, jax.core.Tracer) or not _on_this_process(array):
                return array.astype(dtype)
            numbers = np.asarray(array)
            low_ok = (numbers >= low) if low_allowed else (numbers > low)
            bad = ~(low_ok & (numbers <= high) & np.isfinite(numbers))
            if bad.any():
                raise ValueError(f"{name}: `{field}` must be {wanted}, got {numbers[bad][0]}.")
            if field == "top_k":  # no vocabulary is larger
                numbers = np.minimum(numbers, np.iinfo(np.int32).max)
            return jnp.asarray(numbers, dtype)

        return Sampling(
            checked("temperature", "0 or more", 0, math.inf, True),
            checked("top_k", "an integer >= 1", 1, math.inf, True),
            checked("top_p", "above 0 and at most 1", 0, 1, False),
            checked("min_p", "from 0 to 1", 0, 1, True),
            checked("repetition_penalty", "above 0", 0, math.inf, False),
        )

    @property
    def greedy(self) -> bool:
        """True if the temperature is the Python or NumPy number 0: no key is required."""
        number = isinstance(self.temperature, int | float | np.number)
        return number and bool(self.temperature == 0)


def as_array(value: Any) -> jax.Array | np.ndarray | None:
    """Return the value as an array, or None for rows of different lengths and other objects."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list of traced numbers
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if array.dtype.kind in "OUS" else array


def _on_this_process(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def choose(
    keys: jax.Array | None, logits: jax.Array, seen: jax.Array | None, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Choose a token of each row.

    Args:
      keys: [B] random keys; without keys the most likely token is chosen.
      logits: [B, V].
      seen: [B, V] bool, True for tokens that already occurred; used by the repetition penalty.
      sampling: the checked parameters.

    Returns:
      `(tokens, logprobs)`: [B] int32, and [B] the log-probabilities of the tokens under `logits`,
      without temperature, filters and penalty.
    """
    logprobs = jax.nn.log_softmax(logits)
    weighted = adjust(logits, seen, sampling)
    tokens = jnp.argmax(weighted, axis=-1).astype(jnp.int32)
    if keys is not None:
        temperature = jnp.broadcast_to(sampling.temperature, tokens.shape)
        drawn = _draw(keys, filtered(weighted, sampling))
        tokens = jnp.where(temperature > 0, drawn, tokens)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def adjust(logits: jax.Array, seen: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Apply the repetition penalty to logits [B, V]."""
    if sampling.repetition_penalty is None or seen is None:
        return logits
    penalty = jnp.broadcast_to(sampling.repetition_penalty, logits.shape[:1])[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Return logits [B, V] over the temperature, -inf for tokens that the filters exclude.

    The most likely token is never excluded. Rows with temperature 0 keep their logits.
    """
    rows, vocab = logits.shape

    def column(value: Any) -> jax.Array:
        return jnp.broadcast_to(value, (rows,))[:, None]

    temperature = column(sampling.temperature)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return scaled
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    probabilities = jax.nn.softmax(ranked)
    allowed = jnp.ones(ranked.shape, jnp.bool_)
    if sampling.top_k is not None:
        allowed &= jnp.arange(vocab, dtype=jnp.int32) < column(sampling.top_k)
    if sampling.top_p is not None:
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        allowed &= before < column(sampling.top_p)
    if sampling.min_p is not None:
        allowed &= probabilities >= column(sampling.min_p) * probabilities[:, :1]
    allowed = allowed.at[:, 0].set(True)
    by_token = jnp.zeros_like(allowed).at[jnp.arange(rows)[:, None], order].set(allowed)
    return jnp.where(by_token, scaled, -jnp.inf)


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
