"""Sampling of text from a model, one byte at a time, with a state of constant size."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments.base.errors import UserError
from experiments.data.pipeline import DOCUMENT_START

# (params, prompt, num_bytes, seed, temperature, top_p) -> iterator of bytes
Sampler = Callable[[Any, bytes, int, int, float, float], Iterator[int]]


def choose(
    key: jax.Array, logits: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float
) -> jax.Array:
    """Draw from the smallest set of bytes [V] whose probability reaches `top_p`.

    Temperature 0 takes the most likely byte.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-scaled)
    probabilities = jax.nn.softmax(scaled[order])
    before = jnp.cumsum(probabilities) - probabilities
    # The most likely byte is always allowed.
    allowed = (before < top_p).at[0].set(True)
    drawn = order[jax.random.categorical(key, jnp.where(allowed, scaled[order], -jnp.inf))]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def make_sampler(model: Any) -> Sampler:
    """Return `sample(params, prompt, num_bytes, seed, temperature, top_p)`, compiled once."""
    step = jax.jit(model.step)
    draw = jax.jit(choose)

    def sample(
        params: Any, prompt: bytes, num_bytes: int, seed: int, temperature: float, top_p: float
    ) -> Iterator[int]:
        if temperature < 0:
            raise UserError(f"--temperature={temperature}: must be 0 or more")
        if not 0 < top_p <= 1:
            raise UserError(f"--top_p={top_p}: must be above 0 and at most 1")
        state = model.initial_state(1)
        key = jax.random.key(seed)
        logits: Any = None
        for byte in bytes([DOCUMENT_START]) + prompt:
            logits, state = step(params, np.array([byte], np.int32), state)
        for index in range(num_bytes):
            byte = draw(jax.random.fold_in(key, index), logits[0], temperature, top_p)
            # Dispatch the next step before `int` blocks on this byte.
            logits, state = step(params, byte[None].astype(jnp.int32), state)
            yield int(byte)

    return sample


def encode(prompt: str) -> bytes:
    """Return the bytes of a prompt; bytes that are not UTF-8 pass unchanged from the shell."""
    return prompt.encode("utf-8", "surrogateescape")


def printable(text: str, stream: TextIO) -> str:
    """Escape control characters, except line breaks and tabs, if the stream is a terminal.

    A model can produce sequences that change the terminal's settings. Files and pipes get the text
    unchanged.
    """
    if not stream.isatty():
        return text
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def decode(stream: Iterable[int]) -> Iterator[str]:
    """Decode UTF-8 incrementally; invalid bytes become the replacement character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in stream:
        text = decoder.decode(bytes([byte]))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
