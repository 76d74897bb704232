"""Loading of published checkpoints."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from seqjax import sharding
from seqjax.layers._base import Params, state_dtype
from seqjax.models import LanguageModel
from seqjax.pretrained.config import read_config
from seqjax.pretrained.families import FAMILIES
from seqjax.pretrained.family import Architecture, Family
from seqjax.pretrained.files import DTYPES, Tensors
from seqjax.pretrained.hub import find_folder
from seqjax.pretrained.model import (
    Leaf,
    PretrainedModel,
    Source,
    flat,
    is_stacked,
    leaf_at,
    make_model,
    nested,
    parameter_parts,
)
from seqjax.pretrained.table import Cut, Shape, Tensor


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
      dtype: dtype of the weights, the computation and, if it has 16 bits, the caches of attention;
        by default that of the stored embedding.
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
    opened = _open(path, dtype, capacity, scan, remat)
    model, tensors, parts = opened.model, opened.tensors, opened.parts
    shardings = {}
    if mesh is not None:
        known = {name: axis for name, axis in rules.items() if axis in mesh.shape}
        specs = sharding.param_specs(model, mesh, known)
        shardings = {
            name: NamedSharding(mesh, spec)
            for name, spec in flat(specs, jax.sharding.PartitionSpec).items()
        }
    arrays = {
        name: _array(
            tensors,
            opened.stored,
            leaf,
            is_stacked(name),
            *_declared(model, name, leaf),
            shardings.get(name),
        )
        for name, leaf in parts.items()
    }
    tensors.close()
    return model, nested(arrays)


def read_model(
    source: str | os.PathLike[str] | Mapping[str, Any],
    dtype: Any = None,
    *,
    capacity: int = 4096,
    scan: bool = False,
    remat: bool = False,
) -> PretrainedModel:
    """Return the model of a checkpoint without reading its weights.

    Args:
      source: the `path` of `load`, or the content of a config.json.
      dtype: as in `load`; by default float32 for the content of a config.json.
      capacity, scan, remat: as in `load`.

    Raises:
      ValueError: as `load`. The names, shapes and dtypes of a folder's tensors are checked.
      ImportError: as `load`, for a folder or a name on the hub.

    Example:
      >>> fields = {"model_type": "mamba2", "hidden_size": 64, "num_heads": 2, "n_groups": 1}
      >>> model = read_model(fields | {"num_hidden_layers": 2, "vocab_size": 100})
      >>> abstract_params(model)["embedding"]
      ShapeDtypeStruct(shape=(100, 64), dtype=float32)
    """
    if not isinstance(source, Mapping):
        opened = _open(source, dtype, capacity, scan, remat)
        opened.tensors.close()
        return opened.model
    family = _family(source)
    made = Source(json.dumps(dict(source)), family.prefixes[-1])
    architecture = made.architecture(capacity)
    return _model(made, architecture, np.float32 if dtype is None else dtype, scan, remat)


def abstract_params(model: PretrainedModel) -> Params:
    """Return the shapes and dtypes of the parameters that `load` returns for a model.

    Args:
      model: a result of `load` or `read_model`.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if the model is not such a result.
    """
    if not isinstance(model, PretrainedModel) or model.source is None:
        raise ValueError(
            "abstract_params: `model` must come from seqjax.pretrained.load, got"
            f" {type(model).__name__}."
        )
    architecture = model.source.architecture(capacity=1)  # the table does not depend on it
    parts = parameter_parts(model, model.source.table(architecture), architecture.unused)
    declared = {name: _declared(model, name, leaf) for name, leaf in parts.items()}
    return nested({name: jax.ShapeDtypeStruct(*entry) for name, entry in declared.items()})


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A checked checkpoint: the model, the open tensors, their names and their parts."""

    model: PretrainedModel
    tensors: Tensors
    stored: Mapping[str, str]
    parts: Mapping[str, Leaf]


def _open(
    path: str | os.PathLike[str], dtype: Any, capacity: int, scan: bool, remat: bool
) -> _Opened:
    """Read the config and the headers of the files; check all names, shapes and dtypes."""
    folder = find_folder(path)
    config = read_config(folder)
    family = _family(config)
    tensors = Tensors(folder)
    prefix = family.prefix(tensors.names)
    shapes = {name: shape for name, (_, _, shape) in tensors.names.items()}
    source = Source(json.dumps(config), prefix, sizes=family.sizes_of(prefix, shapes))
    architecture = source.architecture(capacity)
    bare = [name.removeprefix(source.prefix) for name in tensors.names]
    variants = architecture.found_variants(bare)
    writable = tuple(tensor.name for tensor in variants if tensor.writable)
    source = dataclasses.replace(source, variants=writable)
    table = architecture.table(variants)
    stored = _stored_names(table, architecture, source, tensors)
    if dtype is None:
        dtype = DTYPES.get(tensors.names[stored[architecture.embedding]][1], np.float32)
    model = _model(source, architecture, dtype, scan, remat)
    parts = parameter_parts(model, table, architecture.unused)
    entries = (entry for leaf in parts.values() for entry in leaf if entry is not None)
    for cut in {cut.tensor.name: cut for cut, _ in entries}.values():
        _check_tensor(tensors, stored[cut.tensor.name], cut)
    return _Opened(model, tensors, stored, parts)


def _model(
    source: Source, architecture: Architecture, dtype: Any, scan: bool, remat: bool
) -> PretrainedModel:
    model = make_model(source, architecture, dtype, scan, remat)
    if model.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ValueError("load: `dtype` float64 must have jax_enable_x64, got False.")
    return model


def _family(config: Mapping[str, Any]) -> Family:
    if config.get("quantization_config"):
        raise ValueError(
            "load: config field `quantization_config` must be absent, got one; quantized"
            " checkpoints are not supported."
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"load: config field `model_type` must be one of {', '.join(sorted(FAMILIES))}, got"
            f" {kind!r}."
        )
    return FAMILIES[kind]


def _stored_names(
    table: Sequence[Tensor], architecture: Architecture, source: Source, tensors: Tensors
) -> dict[str, str]:
    """Return the stored name of each tensor of the table; check that nothing is missing or left."""
    stored: dict[str, str] = {}
    pieces: set[str] = set()
    for tensor in table:
        if tensor.pieces:
            names = [name.replace("@", source.prefix) for name in tensor.pieces]
            join = tensors.stack if tensor.layout == "experts" else tensors.join
            stored[tensor.name] = join(names)
            pieces |= set(names)
            continue
        names = [name.replace("@", source.prefix) for name in (tensor.name, *tensor.aliases)]
        found = [name for name in names if name in tensors.names]
        if not found:
            raise ValueError(
                f"load: checkpoint must have the tensor `{names[0]}`, got none;"
                f" config.json describes a model of type {source!r} with it."
            )
        stored[tensor.name] = found[0]
    left = set(tensors.names) - set(stored.values()) - pieces
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
    pieces, wanted = tensors.pieces(name), cut.stored_shape
    if pieces is not None:
        wanted = wanted[1:]
    for stored in pieces or [name]:
        _, dtype, shape = tensors.names[stored]
        if dtype not in DTYPES:
            raise ValueError(
                f"load: tensor `{stored}` must be {', '.join(DTYPES)}, got {dtype}; quantized"
                " checkpoints are not supported."
            )
        if shape != wanted and (pieces is not None or not cut.accepts(shape)):
            raise ValueError(
                f"load: tensor `{stored}` must have shape {list(wanted)} for this config.json, got"
                f" {list(shape)}."
            )


def _declared(model: LanguageModel, name: str, leaf: Leaf) -> tuple[Shape, np.dtype]:
    """Return shape and dtype of a parameter."""
    role, shape = (leaf_at(tree, name) for tree in (model.param_roles(), model.param_shapes()))
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
        out = _aligned(sizes, dtype)
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


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return an array at a multiple of 64 bytes, which JAX uses on a CPU without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
