"""Models built from a configuration, and the differences between two configurations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.base.errors import UserError, nearest
from experiments.base.feature_model import FeatureModel
from experiments.base.image_model import ImageClassifier
from seqjax import models
from seqjax.layers import GRID_REGISTRY, REGISTRY, Entry

VOCAB_SIZE = 256
DTYPES = ("bfloat16", "float16", "float32", "float64")  # those of layers


def build_model(model: ConfigDict, vocab_size: int = VOCAB_SIZE) -> models.LanguageModel:
    """Build the language model that `config.model` describes; by default it reads bytes."""
    dtype = model.get("dtype", "float32")
    with _one_line():
        return models.LanguageModel(vocab_size, _backbone(model), dtype=dtype)


def build_classifier(model: ConfigDict, num_classes: int, **inputs: Any) -> models.Classifier:
    """Build the classifier that `config.model` describes; `inputs` go to `models.Classifier`."""
    dtype = model.get("dtype", "float32")
    with _one_line():
        return models.Classifier(num_classes, _backbone(model), dtype=dtype, **inputs)


def build_feature_model(model: ConfigDict, inputs: int, outputs: int) -> FeatureModel:
    """Build the model from features to numbers that `config.model` describes."""
    with _one_line():
        return FeatureModel(inputs, outputs, _backbone(model), _dtype(model))


def build_image_classifier(
    model: ConfigDict, num_classes: int, channels: int, pool: Any
) -> ImageClassifier:
    """Build the classifier of images that `config.model` describes."""
    with _one_line():
        backbone = _backbone(model, {**GRID_REGISTRY, **REGISTRY})
        return ImageClassifier(num_classes, backbone, channels, pool, _dtype(model))


def _dtype(model: ConfigDict) -> str:
    dtype = model.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UserError(f"config.model.dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _backbone(model: ConfigDict, entries: Mapping[str, Entry] = REGISTRY) -> models.Backbone:
    mixers = [_build_layer(name.strip(), model, entries) for name in model.mixers.split(",")]
    return models.Backbone(
        mixers,
        depth=model.depth,
        mlp_ratio=model.mlp_ratio,
        remat=model.get("remat", False),
        scan=model.get("scan", False),
    )


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error


def _build_layer(name: str, model: ConfigDict, entries: Mapping[str, Entry]) -> Any:
    if name not in entries:
        raise UserError(f"config.model.mixers: unknown layer {name!r}: {nearest(name, entries)}")
    entry = entries[name]
    options = model.options.get(name, ConfigDict()).to_dict()
    for option in options:
        if option not in entry.fields:
            raise UserError(
                f"config.model.options.{name}: unknown field {option!r}:"
                f" {nearest(option, entry.fields)}"
            )
    try:
        return entry.make(model.dim, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model.options.{name}: {error}") from error


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return the configuration as plain JSON values, as a checkpoint stores it."""
    return json.loads(json.dumps(config.to_dict()))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `field: old -> new` for every field in which two JSON configurations differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changes += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            changes.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return changes
