"""Finite sets of sequences with one label each: images, expressions, text, time series."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.base.errors import UserError, nearest
from experiments.data import corpus, tfds_sets
from experiments.tasks import listops, pathfinder

HELD_OUT = 0.2


class Split(NamedTuple):
    """Sequences of any length, [T] integer tokens or [T, features] float32, and their labels."""

    inputs: Sequence[np.ndarray]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """A classification task.

    Attributes:
      name: name of the task.

      num_classes: number of labels.

      train: training set.

      test: test set.

      vocab_size: number of tokens, if inputs are tokens.

      input_dim: features per position, if inputs are real numbers.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    vocab_size: int | None = None
    input_dim: int | None = None

    def majority(self) -> float:
        """Return the test accuracy of the most frequent label of the training set."""
        said = Counter(self.train.labels.tolist()).most_common(1)[0][0]
        return float(np.mean(self.test.labels == said))


def list_operations(train: int, test: int, seed: int, **options: int) -> LabelledSet:
    """Generate ListOps; `options` are those of `listops.generate`."""
    train_split, test_split = (
        Split(*listops.generate(np.random.default_rng([seed, split]), count, **options))
        for split, count in ((0, train), (1, test))
    )
    return LabelledSet("ListOps", 10, train_split, test_split, vocab_size=listops.VOCAB_SIZE)


def digits(seed: int) -> LabelledSet:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels as sequences; a fifth is held out."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("the digits come with scikit-learn: pip install -e '.[tasks]'")
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images.reshape(-1, 64, 1) / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(pixels))
    test, train = (
        Split(pixels[i], data.target[i].astype(np.int32))
        for i in np.split(order, [len(order) // 5])
    )
    return LabelledSet("digits", 10, train, test, input_dim=1)


def path_finder(train: int, test: int, seed: int, **options: int) -> LabelledSet:
    """Generate Pathfinder; `options` are those of `pathfinder.generate`."""
    splits = []
    for split, count in ((0, train), (1, test)):
        rng = np.random.default_rng([seed, split])
        drawn, labels = pathfinder.generate(rng, count, **options)
        splits.append(Split(list(drawn), labels))
    return LabelledSet("Pathfinder", 2, splits[0], splits[1], input_dim=1)


class _Pixels(Sequence[np.ndarray]):
    """Images as sequences of pixels: [H * W, channels] float32 in [0, 1].

    Pixels are in the order of the rows, or in one random order for all images.
    """

    def __init__(self, images: np.ndarray, order_seed: int | None) -> None:
        # uint8, a quarter of the memory of float32
        self._images = images.reshape(len(images), -1, images.shape[-1])
        if order_seed is not None:
            order = np.random.default_rng(order_seed).permutation(self._images.shape[1])
            self._images = self._images[:, order]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return self._images[index].astype(np.float32) / 255


def images(name: str, folder: str, order_seed: int | None = None) -> LabelledSet:
    """Load a prepared image set of TensorFlow Datasets, such as mnist or cifar10.

    With `order_seed`, the pixels of all images have the same random order.
    """
    if not name:
        raise UserError("the task images needs --config.task.tfds: mnist, fashion_mnist, cifar10")
    splits = []
    for split in ("train", "test"):
        source = tfds_sets.open_split(name, split, folder, "config.task")
        features = source.dataset_info.features
        for feature in ("image", "label"):
            if feature not in features:
                raise UserError(f"{name!r} has no {feature}: {nearest(feature, list(features))}")
        if None in features["image"].shape:
            raise UserError(f"the images of {name!r} differ in size, which is not supported")
        rows = [source[index] for index in range(len(source))]
        labels = np.array([row["label"] for row in rows], np.int32)
        splits.append(Split(_Pixels(np.stack([row["image"] for row in rows]), order_seed), labels))
    classes, channels = features["label"].num_classes, features["image"].shape[-1]
    return LabelledSet(name, classes, splits[0], splits[1], input_dim=channels)


def packages(length: int, classes: int, seed: int) -> LabelledSet:
    """Cut the standard library's largest packages into windows; the label is the package.

    All windows of a file are in the same split. Held-out windows that also occur in a training file
    (such as tables of codecs) are dropped. All packages have as many windows as the smallest.
    """
    windows: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for name, path in sorted(corpus.standard_library_files().items()):
        if "/" not in name:
            continue
        text = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
        cuts = [text[i : i + length] for i in range(0, len(text) - length // 2, length)]
        side = windows[corpus.position(name) < HELD_OUT]
        side.setdefault(name.split("/")[0], []).extend(cuts)
    train, test = windows
    seen = {cut.tobytes() for cuts in train.values() for cut in cuts}
    test = {name: [cut for cut in test[name] if cut.tobytes() not in seen] for name in test}
    sizes = {name: len(test[name]) for name in test if name in train}
    names = sorted(sorted(sizes, key=lambda name: -sizes[name])[:classes])
    rng = np.random.default_rng(seed)
    splits = []
    for cuts_of in (train, test):
        least = min(len(cuts_of[name]) for name in names)
        chosen = [
            cuts_of[name][i] for name in names for i in rng.permutation(len(cuts_of[name]))[:least]
        ]
        splits.append(Split(chosen, np.repeat(np.arange(len(names), dtype=np.int32), least)))
    return LabelledSet("packages", len(names), splits[0], splits[1], vocab_size=256)


def read_ts(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """Read a file in the `.ts` format of the UCR and UEA archives.

    Returns:
      (list of [T, features] float32 arrays, NaN where a value is missing; labels as text).
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = [line.strip() for line in lines if line.strip() and not line.startswith(("#", "%"))]
    starts = [i for i, line in enumerate(lines) if line.lower() == "@data"]
    header = {}
    for line in lines[: starts[0]] if starts else []:
        name, _, value = line[1:].partition(" ")
        header[name.lower()] = value.strip().lower()
    if not starts:
        raise UserError(f"{path} has no line '@data': it is not a .ts file")
    if header.get("timestamps") == "true":
        raise UserError(
            f"{path} has time stamps, which are not supported: give evenly sampled series"
        )
    if not header.get("classlabel", "").startswith("true"):
        raise UserError(f"{path} has no class labels: it is not a classification set")
    series, labels = [], []
    for number, line in enumerate(lines[starts[0] + 1 :], start=1):
        *channels, label = line.split(":")
        try:
            values = [
                [np.nan if v.strip() == "?" else float(v) for v in channel.split(",")]
                for channel in channels
            ]
            series.append(np.array(values, np.float32).T)
        except ValueError as error:
            raise UserError(f"{path}: series {number} cannot be read: {error}") from error
        labels.append(label.strip())
    return series, labels


def time_series(path: str) -> LabelledSet:
    """Load a UCR or UEA data set from a folder with `*_TRAIN.ts` and `*_TEST.ts`, or from aeon.

    Every channel is scaled to mean 0 and variance 1 over the training set. Missing values become
    the mean.
    """
    if not path:
        raise UserError(
            "the task time_series needs --config.task.path: a folder with NAME_TRAIN.ts and "
            "NAME_TEST.ts, or the name of a set that comes with aeon, such as ACSF1"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _inside_aeon(path)
    files = [sorted(folder.glob(f"*_{split}.ts")) for split in ("TRAIN", "TEST")]
    if not all(files):
        raise UserError(f"config.task.path={path!r} must hold NAME_TRAIN.ts and NAME_TEST.ts")
    (train, names), (test, test_names) = (read_ts(paths[0]) for paths in files)
    classes = sorted(set(names))
    if unknown := set(test_names) - set(classes):
        raise UserError(f"{files[1][0]} has labels that the training set lacks: {unknown}")
    values = np.concatenate(train)
    mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)

    def split(series: list[np.ndarray], labels: list[str]) -> Split:
        scaled = [(x - mean) / np.where(scale > 0, scale, 1) for x in series]
        scaled = [np.where(np.isnan(x), 0, x).astype(np.float32) for x in scaled]
        return Split(scaled, np.array([classes.index(name) for name in labels], np.int32))

    return LabelledSet(
        folder.name,
        len(classes),
        split(train, names),
        split(test, test_names),
        input_dim=values.shape[1],
    )


def _inside_aeon(name: str) -> Path:
    """Return the folder of a data set in aeon's wheel, without importing aeon (takes seconds)."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"config.task.path={name!r} is not a folder; the name of a set that comes with aeon "
            "needs it: pip install aeon"
        )
    root = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    folders = {path.name: path for path in root.iterdir() if list(path.glob("*_TRAIN.ts"))}
    if name not in folders:
        raise UserError(
            f"config.task.path={name!r} is neither a folder nor one of aeon's sets: "
            f"{', '.join(sorted(folders))}"
        )
    return folders[name]
