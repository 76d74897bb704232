"""Writing of checkpoints in their published format."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from seqjax.layers import Layer, _checks
from seqjax.layers._base import Params
from seqjax.models import LanguageModel
from seqjax.pretrained.files import write
from seqjax.pretrained.model import (
    PretrainedModel,
    flat,
    is_stacked,
    make_model,
    parameter_parts,
)
from seqjax.pretrained.table import Cut

# Fields of layers that do not change the function of a sequence, and that configs do not have.
FREE_FIELDS = ("algorithm", "implementation", "capacity", "cache_dtype", "dropout")


def save(
    model: LanguageModel,
    params: Params,
    path: str | os.PathLike[str],
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model that `load` returned in the format of its checkpoint.

    The config is the one that was loaded, with the dtype of the model. Tensors have the dtypes of
    the parameters. Tensors that `load` did not read, such as those of an image encoder, and the
    tokenizer are not written.

    Args:
      model: the model that `load` returned. `dataclasses.replace` may have changed its dtype, and
        options that do not change the function, such as `algorithm` or `scan`.
      params: its parameters.
      path: a folder without safetensors files; it is created.
      shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
      ValueError: if the model did not come from `load`, or has other options than its config; if
        the parameters do not fit or are on other processes; or if the folder has safetensors files.

    Example:
      >>> import tempfile
      >>> from seqjax.pretrained import load
      >>> from seqjax.pretrained.example import write_tiny_mamba
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_tiny_mamba(folder)
      ...     model, params = load(folder)
      ...     save(model, params, folder + "/copy")
      ...     again, params_again = load(folder + "/copy")
      >>> again == model, (params["embedding"] == params_again["embedding"]).all().item()
      (True, True)
    """
    if not isinstance(model, PretrainedModel) or model.source is None:
        raise ValueError(
            f"save: `model` must come from seqjax.pretrained.load, got {type(model).__name__}."
        )
    _checks.params(model, params)
    # The capacity of caches does not change the table.
    architecture = model.source.architecture(capacity=1)
    _check_options(make_model(model.source, architecture, model.dtype, False, False), model)
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.glob("*.safetensors*"))
    if present:
        raise ValueError(
            f"save: folder {str(folder)!r} must have no safetensors files, got {present[0].name};"
            " use a new folder."
        )
    leaves = flat(params)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"save: parameter {name} must be on this process's devices; gather it with"
                " jax.experimental.multihost_utils.process_allgather."
            )
    parts = parameter_parts(model, model.source.table(architecture), architecture.unused)
    arrays: dict[str, tuple[Cut, dict[int, Any]]] = {}
    for name, leaf in parts.items():
        for layer, found in enumerate(leaf):
            if found is None:
                continue
            cut, part = found
            outer = (layer,) if is_stacked(name) else ()
            for stored, inner in cut.each_stored():
                entry = arrays.setdefault(stored.tensor.name, (stored, {}))
                entry[1][part] = (leaves[name], (*outer, *inner))

    prefix = model.source.prefix
    renamed = {name.replace("@", prefix): entry for name, entry in arrays.items()}

    def make(name: str) -> np.ndarray:
        cut, found = renamed[name]
        ordered = [found[part] for part in range(len(cut.shapes))]
        return cut.join(leaf[at] if at else leaf for leaf, at in ordered)

    layout = {
        name: (cut.stored_shape, np.dtype(found[0][0].dtype))
        for name, (cut, found) in sorted(renamed.items())
    }
    values = model.source.values
    text = model.source.family.text
    text_values: dict[str, Any] = (values.get(text) if text else None) or {}
    for fields in (values, text_values):
        for name in ("dtype", "torch_dtype"):
            if name in fields:
                fields[name] = model.dtype
    content = json.dumps(values, indent=2) + "\n"
    (folder / "config.json").write_text(content, encoding="utf-8")
    write(folder, layout, make, shard_bytes)


def _check_options(wanted: PretrainedModel, given: PretrainedModel) -> None:
    """Raise if the function of the model is not that of its config."""
    _compare("", wanted, given, ("backbone", "source", *FREE_FIELDS))
    names = [field.name for field in dataclasses.fields(given.backbone)]
    final_norm = ("norm", "norm_eps")
    skipped = [name for name in names if name not in final_norm]
    _compare("backbone.", wanted.backbone, given.backbone, skipped)
    _compare("backbone.block_", wanted.backbone.stack, given.backbone.stack)


def _compare(path: str, wanted: Any, given: Any, skipped: Sequence[str] = FREE_FIELDS) -> None:
    """Raise at the first option that differs."""
    if isinstance(wanted, Layer) and type(given) is type(wanted):
        made: Any = wanted
        for field in dataclasses.fields(made):
            if field.name not in skipped:
                own, other = (getattr(layer, field.name) for layer in (wanted, given))
                _compare(f"{path}{field.name}.", own, other)
    elif isinstance(wanted, tuple) and isinstance(given, tuple) and len(given) == len(wanted):
        for place, (own, other) in enumerate(zip(wanted, given, strict=True)):
            _compare(f"{path}{place}.", own, other)
    elif wanted != given:
        raise ValueError(
            f"save: `{path[:-1]}` of the model must be that of its config.json, {wanted!r}, got"
            f" {given!r}, which the format cannot store."
        )
