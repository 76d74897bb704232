"""Models built from a configuration, and the differences between two configurations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from experiments.base.errors import UserError, nearest
from experiments.base.feature_model import FeatureModel
from seqjax import models
from seqjax.layers import REGISTRY

VOCAB_SIZE = 256


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
        return FeatureModel(inputs, outputs, _backbone(model))


def _backbone(model: ConfigDict) -> models.Backbone:
    mixers = [_build_layer(name.strip(), model) for name in model.mixers.split(",")]
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


def _build_layer(name: str, model: ConfigDict) -> Any:
    if name not in REGISTRY:
        raise UserError(f"config.model.mixers: unknown layer {name!r}: {nearest(name, REGISTRY)}")
    entry = REGISTRY[name]
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
