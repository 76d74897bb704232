"""Corpora: training and held-out documents of raw bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from experiments.base.errors import UserError

# Test suites are repetitive, and some distributions of Python lack them.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


class Documents(Protocol):
    """A random-access source of documents; a list of bytes is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, and a fingerprint that changes with their bytes."""

    name: str
    train: Documents
    heldout: Sequence[bytes]
    fingerprint: str


def standard_library() -> Path:
    """Return the folder with the standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def standard_library_files() -> dict[str, Path]:
    """Return the modules of the standard library without its tests, about 12 MB of Python."""
    root = standard_library()
    return {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if path.is_file() and not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    }


def load_standard_library(heldout_fraction: float) -> Corpus:
    """Return `standard_library_files` as a corpus; whole files are held out."""
    return _split_by_file("Python standard library", standard_library_files(), heldout_fraction)


def load_path(path: str, heldout_fraction: float) -> Corpus:
    """Return the user's text as a corpus: a file is cut in two, of a folder files are held out."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(
            f"config.data.path={path!r} does not exist: give a file or a folder of text"
        )
    if root.is_file():
        return _split_one(str(root), _read(root), heldout_fraction)
    files = {}
    for file in root.rglob("*"):
        relative = file.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not hidden:
            files[relative.as_posix()] = file
    return _split_by_file(str(root), files, heldout_fraction)


def _split_by_file(name: str, files: dict[str, Path], heldout_fraction: float) -> Corpus:
    texts = {key: text for key in sorted(files) if (text := _read(files[key]))}
    if not texts:
        raise UserError(f"no text in {name}: give config.data.path a folder with files in it")
    if len(texts) == 1:
        return _split_one(name, next(iter(texts.values())), heldout_fraction)
    # In the order of hashes, so that the first bytes are a random sample of the held-out files.
    order = sorted(texts, key=position)
    heldout = [key for key in order if position(key) < heldout_fraction] or order[:1]
    if len(heldout) == len(texts):
        heldout = heldout[:-1]
    train = [texts[key] for key in texts if key not in set(heldout)]
    return _corpus(name, train, [texts[key] for key in heldout])


def _split_one(name: str, text: bytes, heldout_fraction: float) -> Corpus:
    if not text:
        raise UserError(f"{name} is empty: give config.data.path a file with text in it")
    cut = len(text) - int(len(text) * heldout_fraction)
    return _corpus(name, [text[:cut]], [text[cut:]] if cut < len(text) else [])


def _corpus(name: str, train: list[bytes], heldout: list[bytes]) -> Corpus:
    digest = hashlib.sha256()
    for part in (train, heldout):
        digest.update(f"{len(part)} documents".encode())
        for text in part:
            digest.update(f"{len(text)} bytes".encode())
            digest.update(text)
    return Corpus(name, train, heldout, digest.hexdigest()[:16])


def position(key: str) -> float:
    """Return a number in [0, 1), a hash of the name that is the same on every machine."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def take_bytes(documents: Sequence[bytes], limit: int) -> list[bytes]:
    """Return the first `limit` bytes of the documents; the last document is cut short."""
    taken: list[bytes] = []
    for text in documents:
        if limit <= 0:
            break
        taken.append(text[:limit])
        limit -= len(text)
    return taken
