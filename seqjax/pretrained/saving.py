"""Writing of checkpoints in their published format."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from seqjax.layers import _checks
from seqjax.layers._base import Params
from seqjax.models import LanguageModel
from seqjax.pretrained.files import write
from seqjax.pretrained.model import PretrainedModel, flat, is_stacked, parameter_parts
from seqjax.pretrained.table import Cut


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
      model: the model that `load` returned, possibly changed by `dataclasses.replace`.
      params: its parameters.
      path: a folder without safetensors files; it is created.
      shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
      ValueError: if the model did not come from `load`, the parameters do not fit, the folder has
        safetensors files, or parameters are on other processes.

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
    # The capacity of caches does not change the table.
    architecture = model.source.architecture(capacity=1)
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
