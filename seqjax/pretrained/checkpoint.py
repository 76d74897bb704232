"""Loading and saving of published checkpoints."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from seqjax import sharding
from seqjax.layers import _checks
from seqjax.layers._base import Params, state_dtype
from seqjax.models import LanguageModel
from seqjax.pretrained.config import read_config
from seqjax.pretrained.families import FAMILIES
from seqjax.pretrained.family import Architecture, Family
from seqjax.pretrained.files import DTYPES, Tensors, write
from seqjax.pretrained.hub import find_folder
from seqjax.pretrained.table import Cut, Shape, cuts


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that a model came from, so that it can be written back.

    Attributes:
      config: the text of `config.json`.
      prefix: the prefix of the tensor names.
    """

    config: str
    prefix: str

    def __repr__(self) -> str:
        """Return the type of the model."""
        return f"<{json.loads(self.config)['model_type']}>"

    @property
    def values(self) -> dict[str, Any]:
        """The config."""
        return json.loads(self.config)

    @property
    def family(self) -> Family:
        """The family of the model type."""
        return FAMILIES[self.values["model_type"]]

    def architecture(self, capacity: int) -> Architecture:
        """Return the architecture of the config."""
        return self.family.build(self.family.config(self.values), capacity)


@dataclasses.dataclass(frozen=True)
class PretrainedModel(LanguageModel):
    """A `LanguageModel` from a published checkpoint; `load` makes it.

    Attributes:
      source: the checkpoint's config and layout, which `save` writes back.
    """

    source: Source | None = None


def load(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    capacity: int = 4096,
    scan: bool = False,
    remat: bool = False,
    rules: Mapping[str, str] = sharding.RULES,
) -> tuple[PretrainedModel, Params]:
    """Load a published checkpoint: a folder with config.json and safetensors files.

    Tensors are read one at a time. With a mesh every process reads only its shards. Parameters of
    the roles recurrence and norm, and others that the reference keeps in float32, are at least
    float32. A folder is read without any use of the network.

    Args:
      path: a folder, or the name of a repository on the Hugging Face hub such as
        "state-spaces/mamba-130m-hf", which is downloaded.
      mesh: the mesh that parameters are split over by the rules of `seqjax.sharding`; by default
        they are on the default device.
      dtype: dtype of the weights and of the computation; by default that of the stored embedding.
      capacity: number of positions that the cache of full attention holds. A longer sequence
        raises ValueError, or has outputs of NaN past the capacity.
      scan: stack equal blocks and run them in a `lax.scan`; see `Backbone`.
      remat: recompute blocks in the backward pass; see `Backbone`.
      rules: logical axis -> mesh axis, as in `seqjax.sharding.shard`.

    Returns:
      `(model, params)`: a `LanguageModel` and its parameters.

    Raises:
      ValueError: if a config field is missing or has an unsupported value, a tensor is missing, not
        expected, misshapen or of an unsupported dtype, or a file is truncated or a pickle. The
        message names the field, the tensor or the file.
      ImportError: if the package safetensors is missing, or huggingface_hub for a name on the hub.

    Example:
      >>> import tempfile
      >>> from seqjax.pretrained.example import write_tiny_mamba
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_tiny_mamba(folder)
      ...     model, params = load(folder)
      >>> logits, state = model.apply(params, jax.numpy.array([[1, 2, 3]]))
      >>> logits.shape
      (1, 3, 32)
    """
    folder = find_folder(path)
    config = read_config(folder)
    family = _family(config)
    tensors = Tensors(folder)
    source = Source(json.dumps(config), family.prefix(tensors.names))
    architecture = source.architecture(capacity)
    stored = _stored_names(architecture, source, tensors)
    if dtype is None:
        dtype = DTYPES.get(tensors.names[stored[architecture.embedding]][1], np.float32)
    model = PretrainedModel(
        vocab_size=architecture.vocab_size,
        backbone=architecture.backbone(scan, remat),
        tie_embeddings=architecture.tie_embeddings,
        dtype=dtype,
        source=source,
        **architecture.model,
    )
    if model.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ValueError("load: `dtype` float64 must have jax_enable_x64, got False.")
    parts = _parts(model, architecture)
    entries = (entry for leaf in parts.values() for entry in leaf if entry is not None)
    for cut in {cut.tensor.name: cut for cut, _ in entries}.values():
        _check_tensor(tensors, stored[cut.tensor.name], cut)
    shardings = {}
    if mesh is not None:
        known = {name: axis for name, axis in rules.items() if axis in mesh.shape}
        specs = sharding.param_specs(model, mesh, known)
        shardings = {
            name: NamedSharding(mesh, spec)
            for name, spec in _flat(specs, jax.sharding.PartitionSpec).items()
        }
    flat = {
        name: _array(
            tensors,
            stored,
            leaf,
            _stacked(name),
            *_declared(model, name, leaf),
            shardings.get(name),
        )
        for name, leaf in parts.items()
    }
    tensors.close()
    return model, _nested(flat)


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
    flat = _flat(params)
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"save: parameter {name} must be on this process's devices; gather it with"
                " jax.experimental.multihost_utils.process_allgather."
            )
    # The capacity of caches does not change the table.
    parts = _parts(model, model.source.architecture(capacity=1))
    arrays: dict[str, tuple[Cut, dict[int, Any]]] = {}
    for name, leaf in parts.items():
        for layer, found in enumerate(leaf):
            if found is not None:
                cut, part = found
                entry = arrays.setdefault(cut.tensor.name, (cut, {}))
                entry[1][part] = (flat[name], layer if _stacked(name) else None)

    prefix = model.source.prefix
    renamed = {name.replace("@", prefix): entry for name, entry in arrays.items()}

    def make(name: str) -> np.ndarray:
        cut, leaves = renamed[name]
        ordered = [leaves[part] for part in range(len(cut.shapes))]
        return cut.join(leaf if layer is None else leaf[layer] for leaf, layer in ordered)

    layout = {
        name: (cut.stored_shape, np.dtype(leaves[0][0].dtype))
        for name, (cut, leaves) in sorted(renamed.items())
    }
    values = model.source.values
    inner = values.get(model.source.family.text, {}) if model.source.family.text else {}
    for fields in (values, inner):
        for name in ("dtype", "torch_dtype"):
            if name in fields:
                fields[name] = model.dtype
    text = json.dumps(values, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    write(folder, layout, make, shard_bytes)


def _family(config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"load: config field `model_type` must be one of {', '.join(sorted(FAMILIES))}, got"
            f" {kind!r}."
        )
    return FAMILIES[str(kind)]


def _stored_names(architecture: Architecture, source: Source, tensors: Tensors) -> dict[str, str]:
    """Return the stored name of each tensor of the table; check that nothing is missing or left."""
    stored: dict[str, str] = {}
    for tensor in architecture.table():
        names = [name.replace("@", source.prefix) for name in (tensor.name, *tensor.aliases)]
        found = [name for name in names if name in tensors.names]
        if not found:
            raise ValueError(
                f"load: checkpoint must have the tensor `{names[0]}`, got none;"
                f" config.json describes a model of type {source!r} with it."
            )
        stored[tensor.name] = found[0]
    left = set(tensors.names) - set(stored.values())
    if architecture.tie_embeddings:
        left.discard(architecture.head)  # the embedding has the same values
    left = {name for name in left if not source.family.ignores(name)}
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f"load: checkpoint must not have the tensor `{min(left)}`{more}; config.json describes"
            f" a model of type {source!r} without it."
        )
    return stored


def _check_tensor(tensors: Tensors, name: str, cut: Cut) -> None:
    _, dtype, shape = tensors.names[name]
    if dtype not in DTYPES:
        raise ValueError(
            f"load: tensor `{name}` must be {', '.join(DTYPES)}, got {dtype}; quantized checkpoints"
            " are not supported."
        )
    if shape != cut.stored_shape:
        raise ValueError(
            f"load: tensor `{name}` must have shape {list(cut.stored_shape)} for this config.json,"
            f" got {list(shape)}."
        )


Leaf = list[tuple[Cut, int] | None]


def _stacked(name: str) -> bool:
    """Return whether a parameter has the values of several layers along its first axis."""
    return name.startswith("backbone.group_")


def _parts(model: LanguageModel, architecture: Architecture) -> dict[str, Leaf]:
    """Return for each parameter the stored tensor and the part of it, one per stacked layer.

    Parameters without a stored tensor have None.
    """
    plain = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, scan=False))
    shapes = _flat(plain.param_shapes(), tuple)
    made = cuts(architecture.table(), shapes, architecture.unused)
    single: dict[str, tuple[Cut, int] | None] = dict.fromkeys(architecture.unused)
    single |= {param: (cut, part) for cut in made for part, param in enumerate(cut.tensor.params)}
    if not model.backbone.scan:
        return {name: [found] for name, found in single.items()}
    period = sum(name.startswith("group_") for name in model.backbone.declare_params())
    depth = len(model.backbone.stack)
    parts: dict[str, Leaf] = {}
    for name in _flat(model.param_shapes(), tuple):
        head, _, rest = name.removeprefix("backbone.").partition(".")
        if _stacked(name):
            layers = range(int(head.removeprefix("group_")), depth, period)
            parts[name] = [single[f"backbone.block_{layer}.{rest}"] for layer in layers]
        else:
            parts[name] = [single[name]]
    return parts


def _declared(model: LanguageModel, name: str, leaf: Leaf) -> tuple[Shape, np.dtype]:
    """Return shape and dtype of a parameter."""
    role, shape = (_leaf(tree, name) for tree in (model.param_roles(), model.param_shapes()))
    wide = role in ("recurrence", "norm") or any(
        entry is not None and entry[0].tensor.wide for entry in leaf
    )
    dtype = state_dtype(model.dtype) if wide else jnp.dtype(model.dtype)
    return shape, np.dtype(dtype)


def _array(
    tensors: Tensors,
    stored: Mapping[str, str],
    leaf: Leaf,
    stacked: bool,
    shape: Shape,
    dtype: np.dtype,
    where: NamedSharding | None,
) -> jax.Array:
    """Read a parameter: all of it, or the shards of this process's devices."""

    def read(index: Any) -> np.ndarray:
        sizes = [len(range(*entry.indices(n))) for entry, n in zip(index, shape, strict=True)]
        out = np.empty(sizes, dtype)
        chosen = leaf[index[0]] if stacked else leaf
        for layer, entry in enumerate(chosen):
            own = out[layer] if stacked else out
            if entry is None:
                own[...] = 0
                continue
            cut, part = entry
            inner = index[1:] if stacked else index
            cut.read(tensors, stored[cut.tensor.name], part, inner, own)
        return out

    if where is None:
        return jax.device_put(read(tuple(slice(0, n) for n in shape)))
    return jax.make_array_from_callback(shape, where, read)


def _flat(tree: Any, leaf: Any = ()) -> dict[str, Any]:
    """Return the leaves of a tree by their path, with dots."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, leaf))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found}


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *names, last = path.split(".")
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
