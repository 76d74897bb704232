"""Data sets of TensorFlow Datasets, read by index without TensorFlow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.base.errors import UserError, nearest
from experiments.data.corpus import Corpus


class _TextColumn:
    """The text of every example of a data source, as bytes."""

    def __init__(self, source: Sequence[Any], key: str) -> None:
        self._source = source
        self._key = key

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        text = self._source[index][self._key]
        return text.encode() if isinstance(text, str) else bytes(text)


def load(data: ConfigDict) -> Corpus:
    """Load the prepared data set `data.tfds`; never download it."""
    train = _column(data, data.tfds_train)
    heldout = _column(data, data.tfds_heldout)
    digest = hashlib.sha256(repr((data.tfds, data.tfds_train, data.tfds_text)).encode())
    digest.update(repr((len(train), train[0] if len(train) else b"")).encode())
    # Read only the documents that evaluations use, in the order of the data set.
    count = min(len(heldout), data.tfds_heldout_documents)
    texts = [heldout[index] for index in range(count)]
    return Corpus(f"TFDS {data.tfds}", train, texts, digest.hexdigest()[:16])


def _column(data: ConfigDict, split: str) -> _TextColumn:
    source = open_split(data.tfds, split, data.tfds_dir, "config.data")
    keys = source.dataset_info.features.keys()
    if data.tfds_text not in keys:
        raise UserError(
            f"{data.tfds!r} has no feature config.data.tfds_text={data.tfds_text!r}: "
            + nearest(data.tfds_text, keys)
        )
    return _TextColumn(source, data.tfds_text)


def open_split(name: str, split: str, folder: str, where: str) -> Any:
    """Return a split of a prepared data set, read by index; never download it.

    Args:
      name: name of the data set.

      split: name of the split, such as "train" or "train[:90%]".

      folder: folder of the prepared data sets; "" for the default of TFDS.

      where: section of the configuration with `tfds` and `tfds_dir`, for messages.
    """
    tfds = _import(where)
    try:
        # The user downloads: without a network, an attempt hangs for minutes.
        return tfds.data_source(name, split=split, data_dir=folder or None, download=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        close = nearest(name, names).partition("known: ")[0]
        hint = close or f"tfds.list_builders() in Python lists all {len(names)}"
        raise UserError(f"{where}.tfds={name!r}: no such data set: {hint}") from error
    except (NotImplementedError, AssertionError, OSError) as error:
        raise UserError(
            f"the data set {name!r} is not prepared here: run tfds.builder({name!r}, "
            "file_format='array_record').download_and_prepare() in Python first, and name its "
            f"folder with {where}.tfds_dir if it is not the default one"
        ) from error
    except ValueError as error:
        raise UserError(f"{where}.tfds={name!r}: {error}") from error


def _import(where: str) -> Any:
    try:
        import tensorflow_datasets as tfds  # slow to import, and few runs need it
    except ImportError as error:
        raise UserError(
            f"{where}.tfds needs tensorflow-datasets ({error}):"
            " pip install -e '.[experiments]' from a clone"
        ) from error
    return tfds
