"""Tokenizer of a published checkpoint, and documents of tokens with the positions that count."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.base.errors import UserError
from experiments.data import chat

INSTALL = "pip install -e '.[pretrained]'"
# Names of a document's arrays: the tokens read, the tokens to predict, and whether these count.
FEATURES = ("inputs", "targets", "counted")
Document = dict[str, np.ndarray]


class Tokenizer:
    """The tokenizer of a checkpoint folder, from its file tokenizer.json.

    Attributes:
      stop_tokens: tokens that end a text, from the checkpoint's configuration.
      file: the file of the tokenizer.
    """

    def __init__(self, folder: pathlib.Path, date: str | None = None) -> None:
        """Read the tokenizer.

        Args:
          folder: the folder of the checkpoint.
          date: the date that the chat template sees; see `chat.Template`.

        Raises:
          ImportError: if the package tokenizers is missing.
          ValueError: if the folder has no tokenizer.json, or a file is damaged.
        """
        import tokenizers

        self.file = folder / "tokenizer.json"
        if not self.file.exists():
            raise ValueError(
                f"{folder} must have a file tokenizer.json; save the tokenizer with"
                " `tokenizer.save_pretrained` of transformers"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the package raises no narrower class
            raise ValueError(f"{self.file} must be a tokenizer file, got {error}") from None
        # Files may have the settings of someone's batches, which would cut or fill documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder, self._date = folder, date
        self._template: chat.Template | None = None
        self.stop_tokens = _stop_tokens(folder)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that the tokenizer adds to it."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._tokenizer.decode(list(tokens))

    def text(self, text: str, *, end: bool = True) -> tuple[Document, int]:
        """Return a text as a document, and the number of characters that it predicts.

        The first token is not predicted. It is a special token if the tokenizer adds one, or the
        first token of the text. With `end`, the document ends with the first of `stop_tokens`.
        """
        encoding = self._tokenizer.encode(text)
        ids = list(encoding.ids)
        unpredicted = encoding.offsets[0][1] if ids else len(text)
        if end and self.stop_tokens and ids[-1:] != [self.stop_tokens[0]]:
            ids.append(self.stop_tokens[0])
        return _document(ids, np.ones(len(ids), bool)), len(text) - unpredicted

    def chat(self, messages: list[dict[str, Any]]) -> list[Document]:
        """Return the documents of a chat, in which the turns of the assistant count.

        Raises:
          ValueError: if the checkpoint has no chat template, or the template refuses the chat.
        """
        if self._template is None:
            self._template = chat.Template(self._folder, self._date)
        documents = []
        for text, spans in self._template.render(messages):
            # The template writes the special tokens.
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            counted = [
                any(start < stop and low <= start < high for low, high in spans)
                for start, stop in encoding.offsets
            ]
            documents.append(_document(encoding.ids, np.array(counted, bool)))
        return documents


def _document(ids: Sequence[int], counted: np.ndarray) -> Document:
    tokens = np.asarray(ids, np.int32)
    return {"inputs": tokens[:-1], "targets": tokens[1:], "counted": counted[1:]}


def check_vocabulary(ids: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> None:
    """Raise an error if a token is not in the vocabulary of the model, which would read NaN."""
    largest = max((int(np.max(part)) for part in ids if len(part)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer.json: tokens must be below vocab_size = {vocab_size} of config.json, got"
            f" {largest}; use the tokenizer of this checkpoint"
        )


def _stop_tokens(folder: pathlib.Path) -> tuple[int, ...]:
    """Return the end-of-text tokens that the configuration files name."""
    for name in ("generation_config.json", "config.json"):
        fields = chat.read_object(folder / name)
        # Checkpoints that also have images have a config of the text model.
        for config in (fields, fields.get("text_config")):
            ids = config.get("eos_token_id") if isinstance(config, dict) else None
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(entry) is int and entry >= 0 for entry in ids):
                raise ValueError(f"{name}: `eos_token_id` must have integers >= 0, got {ids!r}")
            return tuple(ids)
    return ()
