"""Deterministic, resumable training batches: shuffled documents, packed into shuffled windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental
from ml_collections import ConfigDict

from experiments.base.errors import UserError
from experiments.data import corpus as corpora
from experiments.data import tfds_sets

Convert = Callable[[Any], dict[str, np.ndarray]]
# Input byte for predicting the first byte of a document.
DOCUMENT_START = 0


def load_corpus(data: ConfigDict) -> corpora.Corpus:
    """Load the corpus that `config.data` selects and check its size."""
    if data.path and data.tfds:
        raise UserError("config.data.path and config.data.tfds are both set: give one of them")
    if not 0 < data.heldout_fraction < 1:
        raise UserError(
            f"config.data.heldout_fraction={data.heldout_fraction}: must be between 0 and 1"
        )
    if data.tfds:
        corpus = tfds_sets.load(data)
    elif data.path:
        corpus = corpora.load_path(data.path, data.heldout_fraction)
    else:
        corpus = corpora.load_standard_library(data.heldout_fraction)
    _check_size(corpus, data.length)
    return corpus


def _check_size(corpus: corpora.Corpus, length: int) -> None:
    if length < 1:
        raise UserError(f"config.data.length={length}: must be at least 1")
    size = 0
    for index in range(len(corpus.train)):
        size += len(corpus.train[index])
        if size >= length:
            break
    if size < length or not any(corpus.heldout):
        raise UserError(
            f"{corpus.name} is too small: {size} bytes to train on and "
            f"{sum(map(len, corpus.heldout))} held out, one window needs {length}; "
            "give more text or a smaller config.data.length"
        )


class _TokenSource:
    """Grain source of documents as arrays of inputs and targets.

    Contains every `step`-th document from `start` on.
    """

    def __init__(self, documents: Any, convert: Convert, start: int = 0, step: int = 1) -> None:
        self._documents = documents
        self._convert = convert
        self._indices = range(start, len(documents), step)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._convert(self._documents[self._indices[int(index)]])

    def __repr__(self) -> str:
        return f"_TokenSource({len(self)} documents)"


def shift(document: bytes) -> dict[str, np.ndarray]:
    """Return the inputs and targets of a document: each input is the byte before its target."""
    targets = np.frombuffer(document, np.uint8)
    inputs = np.empty_like(targets)
    inputs[:1] = DOCUMENT_START
    inputs[1:] = targets[:-1]
    return {"inputs": inputs, "targets": targets}


def train_batches(
    documents: Any,
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle_windows: int,
    streams: int = 1,
    rows: Sequence[int] | None = None,
    convert: Convert | None = None,
    features: Sequence[str] = ("inputs", "targets"),
) -> Streams:
    """Return an endless iterator of `inputs`, `targets` [B,T] uint8 and `segment_ids` [B,T] int32.

    `documents` are bytes, or of any kind that `convert` returns as arrays of equal length, whose
    names are `features`. The batches then have these arrays in place of inputs and targets.

    Documents are shuffled in each epoch and packed end to end into windows of `length` bytes. A
    buffer of `shuffle_windows` windows is shuffled again, so that a batch mixes many documents.
    The iterator's state is a small JSON value, from which it resumes at the next batch.

    With several `streams`, each stream reads a separate part of the documents and fills a fixed
    share of the rows. Only the streams that fill `rows` are read (by default all streams), and the
    other rows are zeros. The content of a batch therefore does not depend on the number of
    processes.
    """
    if batch_size % streams or streams > len(documents):
        raise UserError(
            f"config.data.streams={streams} must divide config.data.batch_size={batch_size} and "
            f"not exceed the number of documents, {len(documents)}"
        )
    share = batch_size // streams
    wanted = range(streams) if rows is None else sorted({row // share for row in rows})
    return Streams(
        {
            stream: _stream(
                _TokenSource(documents, convert or shift, stream, streams),
                features,
                length,
                share,
                seed,
                shuffle_windows,
            )
            for stream in wanted
        },
        batch_size,
    )


class Streams:
    """Iterator over batches whose rows come from several Grain iterators."""

    def __init__(self, parts: dict[int, grain.DatasetIterator], batch_size: int) -> None:
        self._parts = parts
        self._batch_size = batch_size

    def __iter__(self) -> Streams:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch: dict[str, np.ndarray] = {}
        for stream, part in self._parts.items():
            for name, rows in next(part).items():
                share = rows.shape[0]
                if share == self._batch_size:
                    batch[name] = rows
                    continue
                whole = batch.setdefault(
                    name, np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
                )
                whole[stream * share : (stream + 1) * share] = rows
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position of each stream of this process, as JSON values."""
        return {str(stream): part.get_state() for stream, part in self._parts.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state; entries for streams of other processes are ignored."""
        for stream, part in self._parts.items():
            part.set_state(state[str(stream)])


def _stream(
    source: _TokenSource,
    features: Sequence[str],
    length: int,
    batch_size: int,
    seed: int,
    shuffle_windows: int,
) -> grain.DatasetIterator:
    def window(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = {name: packed[name] for name in features}
        return arrays | {"segment_ids": packed[f"{features[0]}_segment_ids"]}

    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    dataset = grain_experimental.ConcatThenSplitIterDataset(
        dataset, length_struct=dict.fromkeys(features, length)
    )
    dataset = grain_experimental.WindowShuffleIterDataset(
        dataset, window_size=shuffle_windows, seed=seed
    )
    return iter(dataset.map(window).batch(batch_size, drop_remainder=True))


def resume(batches: Streams, state: Any) -> None:
    """Resume an iterator of `train_batches` from a state that was stored as JSON."""
    batches.set_state(_tuples(state))


def _tuples(value: Any) -> Any:
    # JSON turns tuples into lists. Grain's packing compares its slices with a tuple, so a list
    # would drop or repeat a document.
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def windows(documents: Sequence[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Concatenate documents of arrays and cut them into rows [N, length], padded with zeros.

    Adds `segment_ids` int32, which number the documents from 1. Padding has the id 0.
    """
    sizes = [len(next(iter(document.values()))) for document in documents]
    arrays = {name: np.concatenate([doc[name] for doc in documents]) for name in documents[0]}
    arrays["segment_ids"] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
    pad = -sum(sizes) % length
    return {name: np.pad(array, (0, pad)).reshape(-1, length) for name, array in arrays.items()}


def lanes(documents: Sequence[bytes], count: int, length: int) -> dict[str, np.ndarray]:
    """Return the lanes of documents of bytes; see `document_lanes`.

    A lane starts like a document, with byte 0, so that it reads no byte of the lane before it.
    """
    return document_lanes(
        [shift(text) for text in documents if text], count, length, DOCUMENT_START
    )


def document_lanes(
    documents: Sequence[dict[str, np.ndarray]], count: int, length: int, first: int | None = None
) -> dict[str, np.ndarray]:
    """Concatenate documents and split them into `count` lanes, to read with a carried state.

    Returns `inputs`, `targets`, `reset` and `counted`, each [count, n * length]. Every target is in
    one lane; `counted` is False on the padding at the end, and where the documents say so. A lane
    starts with a reset and, if `first` is given, with this input.
    """
    targets = np.concatenate([part["targets"] for part in documents])
    inputs = np.concatenate([part["inputs"] for part in documents])
    counted = [part.get("counted", np.ones(len(part["targets"]), bool)) for part in documents]
    starts = np.cumsum([0] + [len(part["targets"]) for part in documents[:-1]])
    reset = np.zeros(targets.shape, bool)
    reset[starts] = True

    lane = -(-len(targets) // count)
    padded = -(-lane // length) * length

    def cut(stream: np.ndarray) -> np.ndarray:
        stream = np.pad(stream, (0, count * lane - len(stream))).reshape(count, lane)
        return np.pad(stream, ((0, 0), (0, padded - lane)))

    result = {
        "inputs": cut(inputs),
        "targets": cut(targets),
        "reset": cut(reset),
        "counted": cut(np.concatenate(counted)),
    }
    if first is not None:
        result["inputs"][:, 0] = first
    result["reset"][:, 0] = True
    return result
