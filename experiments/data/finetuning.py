"""Documents of tokens to fine-tune on, from a text file or a file with a JSON object per line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.base.errors import UserError
from experiments.data.corpus import position
from experiments.data.tokens import FEATURES, Document, Tokenizer

FORMS = 'write {"text": ...} or {"messages": [{"role": ..., "content": ...}]}'


@dataclasses.dataclass(frozen=True)
class TokenCorpus:
    """Training and held-out documents of tokens.

    Attributes:
      name: name of the file, for messages.
      train, heldout: the documents.
      fingerprint: text that changes with the documents: the file, the tokenizer, the template.
    """

    name: str
    train: list[Document]
    heldout: list[Document]
    fingerprint: str


def load(path: str, tokenizer: Tokenizer, heldout_fraction: float) -> TokenCorpus:
    """Read FILE.jsonl, or any other file as one text.

    The last part of a text is held out, and of a JSONL file the lines with the smallest hashes.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"config.data.heldout_fraction={heldout_fraction}: must be between 0 and 1")
    text = read_text(path, "--data")
    if Path(path).suffix == ".jsonl":
        train, heldout = _split_lines(path, text, tokenizer, heldout_fraction)
    else:
        cut = len(text) - int(len(text) * heldout_fraction)
        train, heldout = ([tokenizer.text(part)[0]] for part in (text[:cut], text[cut:]))
    train, heldout = (
        [document for document in part if document["counted"].any()] for part in (train, heldout)
    )
    return TokenCorpus(path, train, heldout, _fingerprint(train, heldout))


def _fingerprint(*parts: Sequence[Document]) -> str:
    """Return a hash of all documents, and of the places where these begin and end."""
    digest = hashlib.sha256()
    for documents in parts:
        digest.update(b"%d documents" % len(documents))
        for document in documents:
            for name in FEATURES:
                digest.update(b"%d %s" % (len(document[name]), name.encode()))
                digest.update(document[name].tobytes())
    return digest.hexdigest()[:16]


def read_text(path: str, flag: str) -> str:
    """Return the text of a file that must not be empty; `flag` names it in messages."""
    try:
        text = Path(path).expanduser().read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {flag}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{flag}={path} must be UTF-8 text, got another byte at position {error.start}"
        ) from None
    if not text.strip():
        raise UserError(f"{flag}={path} is empty: give a file with text in it")
    return text


def _split_lines(
    path: str, text: str, tokenizer: Tokenizer, heldout_fraction: float
) -> tuple[list[Document], list[Document]]:
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    records = {number: _record(path, number, line) for number, line in lines.items()}
    if len(records) < 2:
        raise UserError(f"--data={path} must have at least 2 lines, one to hold out, got 1")
    order = sorted(lines, key=lambda number: position(lines[number]))
    count = sum(position(line) < heldout_fraction for line in lines.values())
    heldout = set(order[: min(max(count, 1), len(order) - 1)])
    documents: dict[bool, list[Document]] = {True: [], False: []}
    for number, record in records.items():
        try:
            found = (
                [tokenizer.text(record["text"])[0]]
                if "text" in record
                else tokenizer.chat(record["messages"])
            )
        except ValueError as error:
            raise UserError(f"--data={path}, line {number}: {error}") from None
        documents[number in heldout] += found
    return documents[False], documents[True]


def _record(path: str, number: int, line: str) -> dict[str, Any]:
    """Return the checked object of a line."""
    where = f"--data={path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: must be valid JSON, got {error}; {FORMS}") from None
    if not isinstance(record, dict) or len({"text", "messages"} & record.keys()) != 1:
        raise UserError(f"{where}: must be an object with `text` or `messages`; {FORMS}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise UserError(f"{where}: must be Unicode text, got {half} without its pair") from None
    if "text" in record:
        if not isinstance(record["text"], str):
            raise UserError(f"{where}: `text` must be a string; {FORMS}")
        return record
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list that is not empty; {FORMS}")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where}: every message must have the strings role and content")
    return record
