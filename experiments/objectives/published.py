"""Text from a published checkpoint, with its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import seqjax
from experiments.base.errors import UserError
from experiments.data import pipeline
from experiments.data.tokens import INSTALL, Tokenizer, check_vocabulary
from experiments.objectives import int8
from experiments.objectives.sampling import GROUP_SIZE, Conversation, Settings
from seqjax.models import LanguageModel


class Published:
    """A published language model and its tokenizer.

    Attributes:
      stop_tokens: tokens that end a text, from the checkpoint's configuration.
    """

    def __init__(self, path: str, *, capacity: int = 4096, in_int8: bool = False) -> None:
        """Load a folder, or a name on the Hugging Face hub, in the dtype of its weights.

        With `in_int8`, projections are stored in int8.
        """
        with one_line(path):
            from seqjax.pretrained import hub, load

            folder = hub.find_folder(path)
            self._tokenizer = Tokenizer(folder)
            model, self._params = load(folder, capacity=capacity)
        self._model: LanguageModel = model
        if in_int8:
            self._model, self._params = int8.of_model(model), int8.quantize(self._params)
        self.stop_tokens = self._tokenizer.stop_tokens

    def stream(self, prompt: str, settings: Settings) -> Iterator[str]:
        """Yield the text that follows a prompt, up to `num_bytes` tokens or the stop string."""
        tokens = self._tokenizer.encode(prompt)
        if not tokens:
            raise UserError("--prompt: must have at least one token for this tokenizer")
        check_vocabulary([tokens], self._model.vocab_size)
        groups = seqjax.stream(
            self._model,
            self._params,
            jnp.asarray(tokens, jnp.int32)[None],
            group_size=GROUP_SIZE,
            stop_tokens=self.stop_tokens,
            **settings.options(),
        )
        made = (
            token
            for group in groups
            for token in np.asarray(group.tokens)[0, : int(group.lengths[0])].tolist()
        )
        yield from until(settings.stop.decode("utf-8", "replace"), self._decode(made))

    def conversation(self, settings: Settings) -> Callable[[str], Iterator[str]]:
        """Return a function from the user's next line to the continuation of the conversation."""
        turns = Conversation(
            self._model,
            self._params,
            dataclasses.replace(settings, stop=b""),
            start=(),
            stop_tokens=self.stop_tokens,
        )
        lines = itertools.count()

        def answer(line: str) -> Iterator[str]:
            # Special tokens belong to the start of the text.
            tokens = self._tokenizer.encode(line, special=next(lines) == 0)
            check_vocabulary([tokens], self._model.vocab_size)
            stop = settings.stop.decode("utf-8", "replace")
            return until(stop, self._decode(turns.answer(tokens)))

        return answer

    def _decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode tokens incrementally; a character may need several tokens."""
        read: list[int] = []
        shown = ""
        for token in tokens:
            if token in self.stop_tokens:
                break
            read.append(token)
            text = self._tokenizer.decode(read)
            if text.endswith("\ufffd"):  # a part of a character
                continue
            yield text[len(shown) :]
            shown = text


def until(stop: str, pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces of a text up to and with the first occurrence of `stop`."""
    text = ""
    for piece in pieces:
        end = (text + piece).find(stop, max(0, len(text) - len(stop) + 1)) if stop else -1
        if end >= 0:
            yield (text + piece)[len(text) : end + len(stop)]
            return
        yield piece
        text += piece


@dataclasses.dataclass(frozen=True)
class Reading:
    """A text in the tokens of a published model, before the weights are read.

    Attributes:
      model: the model.
      params: function that reads the weights.
      streams: the text in lanes; see `pipeline.document_lanes`.
      window: tokens of a window.
      num_tokens: number of predicted tokens.
      num_bytes: number of bytes of the text that these tokens are.
      context: tokens after which the state is cleared; 0 if it never is.
    """

    model: Any
    params: Callable[[], Any]
    streams: dict[str, np.ndarray]
    window: int
    num_tokens: int
    num_bytes: int
    context: int

    @property
    def remark(self) -> str:
        """Return a part of a sentence on the context, or an empty string."""
        if not self.context:
            return ""
        return f", with the state cleared every {self.context:,} tokens to bound attention caches"


def read_text(
    path: str,
    text: str,
    *,
    window: int,
    lanes: int,
    dtype: str | None,
    capacity: int = 4096,
    in_int8: bool = False,
) -> Reading:
    """Return a text as windows of tokens for a published model.

    The state of a recurrence is carried over the whole text. A model with full attention has a
    cache of `capacity` tokens, and its state is cleared as often as this requires.

    Args:
      path: a folder, or a name on the Hugging Face hub.
      text: the text, which is one document.
      window: tokens of a window.
      lanes: number of parts of the text that are read side by side.
      dtype: dtype of the weights; None for that of the files.
      capacity: tokens of attention caches.
      in_int8: whether projections are stored in int8.
    """
    with one_line(path):
        from seqjax.pretrained import hub, load, read_model

        folder = hub.find_folder(path)
        document, characters = Tokenizer(folder).text(text, end=False)
        model = read_model(folder, dtype, capacity=capacity)
        cached = model.backbone != read_model(folder, dtype, capacity=2 * capacity).backbone
    check_vocabulary((document["inputs"], document["targets"]), model.vocab_size)
    tokens = len(document["targets"])
    if not 0 < lanes <= tokens:
        raise UserError(
            f"--text: must have more than {lanes} tokens for {lanes} lanes, got {tokens}"
        )
    if cached and window > capacity:
        raise UserError(f"--window={window}: must be at most {capacity} for a model with attention")
    streams = pipeline.document_lanes([document], lanes, window)
    context = capacity // window * window if cached else 0
    if context:
        streams["reset"][:, ::context] = True

    def params() -> Any:
        with one_line(path):
            loaded = load(folder, dtype=dtype, capacity=capacity)[1]
        return int8.quantize(loaded) if in_int8 else loaded

    size = len(text[len(text) - characters :].encode())
    chosen = int8.of_model(model) if in_int8 else model
    return Reading(chosen, params, streams, window, tokens, size, context)


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Turn errors of the loader into errors that name the flag."""
    try:
        yield
    except ImportError as error:
        reason = f"{error.name} is missing; run {INSTALL}" if error.name else str(error)
        raise UserError(f"--checkpoint={path}: {reason}") from None
    except ValueError as error:
        raise UserError(f"--checkpoint={path}: {error}") from None
