"""The model of a checkpoint, and the place of each of its parameters in the files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from seqjax.models import LanguageModel
from seqjax.pretrained.families import FAMILIES
from seqjax.pretrained.family import Architecture, Family
from seqjax.pretrained.table import Cut, Tensor, cuts


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that a model came from, so that it can be written back.

    Attributes:
      config: the text of `config.json`.
      prefix: the prefix of the tensor names.
      variants: the names of the variants of tensors that it has, and that can be written.
      sizes: sizes that the config omits, by their name.
    """

    config: str
    prefix: str
    variants: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

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
        config = self.family.config(self.values)
        config.values |= {name: size for name, size in self.sizes if not config.has(name)}
        try:
            return self.family.build(config, capacity)
        except ValueError as error:
            if str(error).startswith("load: "):
                raise
            raise ValueError(f"load: config.json must describe a valid model; {error}") from None

    def table(self, architecture: Architecture) -> list[Tensor]:
        """Return the tensors to write."""
        return architecture.table(x for x in architecture.variants if x.name in self.variants)


@dataclasses.dataclass(frozen=True)
class PretrainedModel(LanguageModel):
    """A `LanguageModel` from a published checkpoint; `load` makes it.

    Attributes:
      source: the checkpoint's config and layout, which `save` writes back.
    """

    source: Source | None = None


def make_model(
    source: Source, architecture: Architecture, dtype: Any, scan: bool, remat: bool
) -> PretrainedModel:
    """Return the model of an architecture."""
    model = PretrainedModel(
        vocab_size=architecture.vocab_size,
        backbone=architecture.backbone(scan, remat),
        tie_embeddings=architecture.tie_embeddings,
        dtype=dtype,
        source=source,
        **architecture.model,
    )
    cached = architecture.with_cache_dtype(model.dtype)
    return dataclasses.replace(model, backbone=cached.backbone(scan, remat))


Leaf = list[tuple[Cut, int] | None]


def is_stacked(name: str) -> bool:
    """Return whether a parameter has the values of several layers along its first axis."""
    return name.startswith("backbone.group_")


def parameter_parts(
    model: LanguageModel, table: Sequence[Tensor], unused: Sequence[str]
) -> dict[str, Leaf]:
    """Return for each parameter the stored tensor and the part of it, one per stacked layer.

    Parameters without a stored tensor have None.
    """
    plain = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, scan=False))
    shapes = flat(plain.param_shapes(), tuple)
    made = cuts(table, shapes, unused)
    single: dict[str, tuple[Cut, int] | None] = dict.fromkeys(unused)
    single |= {param: (cut, part) for cut in made for part, param in enumerate(cut.tensor.params)}
    if not model.backbone.scan:
        return {name: [found] for name, found in single.items()}
    period = sum(name.startswith("group_") for name in model.backbone.declare_params())
    depth = len(model.backbone.stack)
    parts: dict[str, Leaf] = {}
    for name in flat(model.param_shapes(), tuple):
        head, _, rest = name.removeprefix("backbone.").partition(".")
        if is_stacked(name):
            layers = range(int(head.removeprefix("group_")), depth, period)
            parts[name] = [single[f"backbone.block_{layer}.{rest}"] for layer in layers]
        else:
            parts[name] = [single[name]]
    return parts


def flat(tree: Any, leaf: Any = ()) -> dict[str, Any]:
    """Return the leaves of a tree by their path, with dots."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, leaf))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found}


def leaf_at(tree: Any, path: str) -> Any:
    """Return the leaf of a tree at a path with dots."""
    for name in path.split("."):
        tree = tree[name]
    return tree


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of leaves by path: the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *names, last = path.split(".")
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
