"""Text from a published checkpoint, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

import seqjax
from experiments.base.errors import UserError
from experiments.data.tokens import INSTALL, Tokenizer
from experiments.objectives.sampling import GROUP_SIZE, Settings


class Published:
    """A published language model and its tokenizer.

    Attributes:
      stop_tokens: tokens that end a text, from the checkpoint's configuration.
    """

    def __init__(self, path: str, *, capacity: int = 4096) -> None:
        """Load a folder, or a name on the Hugging Face hub, in the dtype of its weights."""
        try:
            from seqjax.pretrained import hub, load

            folder = hub.find_folder(path)
            self._tokenizer = Tokenizer(folder)
            self._model, self._params = load(folder, capacity=capacity)
        except ImportError as error:
            reason = f"{error.name} is missing; run {INSTALL}" if error.name else str(error)
            raise UserError(f"--checkpoint={path}: {reason}") from None
        except ValueError as error:
            raise UserError(f"--checkpoint={path}: {error}") from None
        self.stop_tokens = self._tokenizer.stop_tokens

    def stream(self, prompt: str, settings: Settings) -> Iterator[str]:
        """Yield the text that follows a prompt, up to `num_bytes` tokens or the stop string."""
        tokens = self._tokenizer.encode(prompt)
        if not tokens:
            raise UserError("--prompt: must have at least one token for this tokenizer")
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
