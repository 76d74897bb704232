"""Sampling of text from a byte-level model, with a state of constant size."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from experiments.base.errors import UserError
from experiments.data.pipeline import DOCUMENT_START

GROUP_SIZE = 16  # bytes that the device makes before the first of them is shown


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a sample, checked at construction.

    Attributes:
      num_bytes: largest number of bytes to generate.
      temperature: sampling temperature; 0 takes the most likely byte.
      top_p: draw from the most likely bytes with this total probability.
      top_k: draw from this number of most likely bytes; 0 for all.
      seed: seed of the random draws.
      stop: end the text after this string; by default it ends after `num_bytes`.
    """

    num_bytes: int
    temperature: float
    top_p: float
    top_k: int = 0
    seed: int = 0
    stop: bytes = b""

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("num_bytes", self.num_bytes >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not valid:
                raise UserError(f"--{name}={getattr(self, name)}: must be {wanted}")

    def options(self) -> dict[str, Any]:
        """Return the keywords of `seqjax.generate` and `seqjax.stream`."""
        return {
            "max_new_tokens": self.num_bytes,
            "temperature": self.temperature,
            "top_p": self.top_p if self.top_p < 1 else None,
            "top_k": self.top_k or None,
            "key": jax.random.key(self.seed),
        }


def stream(model: Any, params: Any, prompt: bytes, settings: Settings) -> Iterator[int]:
    """Yield the bytes of one text as the device makes them."""
    tokens = jnp.asarray(np.frombuffer(bytes([DOCUMENT_START]) + prompt, np.uint8)[None])
    groups = seqjax.stream(model, params, tokens, group_size=GROUP_SIZE, **settings.options())
    yield from until(
        settings.stop, (int(b) for group in groups for b in np.asarray(group.tokens)[0])
    )


def batch(model: Any, params: Any, prompts: Sequence[bytes], settings: Settings) -> list[bytes]:
    """Return one text for each prompt, made in one batch."""
    rows = [bytes([DOCUMENT_START]) + prompt for prompt in prompts]
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    equal = (lengths == lengths[0]).all()
    out = seqjax.generate(
        model,
        params,
        jnp.asarray(tokens),
        lengths=None if equal else jnp.asarray(lengths),
        **settings.options(),
    )
    return [bytes(until(settings.stop, row.tolist())) for row in np.asarray(out.tokens)]


class Conversation:
    """A text that a user and the model write in turns; the state carries all earlier lines."""

    def __init__(
        self,
        model: Any,
        params: Any,
        settings: Settings,
        *,
        start: Sequence[int] = (DOCUMENT_START,),
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Start a text with the tokens `start`; an answer ends with one of `stop_tokens`."""
        self._model, self._params, self._settings = model, params, settings
        self._state: Any = None
        self._unread = list(start)
        self._stop_tokens = stop_tokens
        self._turns = 0

    def answer(self, line: Sequence[int]) -> Iterator[int]:
        """Read a line and yield the next tokens; in byte models, the stop string ends them."""
        text = [*self._unread, *line]
        if not text:
            return
        # Prompts are padded, so that lines of different lengths share a compiled program.
        tokens = np.zeros((1, -(-len(text) // 64) * 64), np.int32)
        tokens[0, : len(text)] = text
        settings = dataclasses.replace(self._settings, seed=self._settings.seed + self._turns)
        groups = seqjax.stream(
            self._model,
            self._params,
            jnp.asarray(tokens),
            lengths=jnp.array([len(text)]),
            state=self._state,
            group_size=1,
            stop_tokens=self._stop_tokens,
            **settings.options(),
        )
        self._turns += 1

        def read() -> Iterator[int]:
            for group in groups:
                # The state is that before the group's token, which the next line begins with.
                self._state, self._unread = group.state, np.asarray(group.tokens)[0].tolist()
                yield self._unread[0]

        yield from until(self._settings.stop, read())


def until(stop: bytes, stream: Iterable[int]) -> Iterator[int]:
    """Yield bytes up to and with the first occurrence of `stop`; all bytes if it is empty."""
    last = b""
    for byte in stream:
        yield byte
        last = (last + bytes([byte]))[-len(stop) :] if stop else b""
        if stop and last == stop:
            return


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
