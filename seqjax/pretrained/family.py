"""Families of checkpoints: what a config mapping returns, and the names of a family's tensors."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from seqjax.layers import Layer
from seqjax.layers.norm import NormKind
from seqjax.models import Backbone, Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.table import Tensor, rows


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model of a config, with the table of its tensors.

    Attributes:
      blocks: all blocks, in order.
      tables: the tensors of each block, with paths inside the block.
      embedding, final_norm, layers: the names of the other tensors; "{}" in `layers` stands for the
        number of a block.
      vocab_size, tie_embeddings: fields of `LanguageModel`.
      norm, norm_eps: kind and constant of the final norm.
      model: further fields of `LanguageModel`.
      extra: further tensors.
      unused: parameters that no tensor stores. They are zeros, and the model does not read them.
      variants: tensors of other formats, each in place of all tensors that have its parameters.
      head: the name of the output weights.
      embedding_aliases: other names of the embedding that are accepted.
    """

    blocks: Sequence[Block]
    tables: Sequence[Sequence[Tensor]]
    embedding: str
    final_norm: str
    layers: str
    vocab_size: int
    tie_embeddings: bool
    norm: NormKind
    norm_eps: float
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: Sequence[Tensor] = ()
    unused: Sequence[str] = ()
    variants: Sequence[Tensor] = ()
    head: str = "lm_head.weight"
    embedding_aliases: tuple[str, ...] = ()

    def backbone(self, scan: bool, remat: bool) -> Backbone:
        """Return the backbone, with a repeated pattern of blocks once."""
        blocks, depth = list(self.blocks), len(self.blocks)
        period = next(
            p for p in range(1, depth + 1) if depth % p == 0 and blocks[p:] == blocks[: depth - p]
        )
        return Backbone(
            blocks[:period],
            depth=depth,
            norm=self.norm,
            norm_eps=self.norm_eps,
            scan=scan,
            remat=remat,
        )

    def with_cache_dtype(self, dtype: str) -> "Architecture":
        """Return the architecture with attention caches in the dtype of the model, if it is 16-bit.

        Keys and values have the dtype of the model, so that wider caches would hold no more bits.
        """
        if dtype not in ("bfloat16", "float16"):
            return self
        return dataclasses.replace(self, blocks=[_with_cache_dtype(b, dtype) for b in self.blocks])

    def found_variants(self, stored: Iterable[str]) -> list[Tensor]:
        """Return the variants that a checkpoint has, from its names without their prefix."""
        stored = set(stored)
        firsts = ((tensor, (*tensor.pieces, tensor.name)[0]) for tensor in self.variants)
        return [tensor for tensor, first in firsts if first.removeprefix("@") in stored]

    def table(self, variants: Iterable[Tensor] = ()) -> list[Tensor]:
        """Return all tensors, with paths of parameters in a backbone that is not stacked.

        Args:
          variants: the variants in use.
        """
        variants = list(variants)
        replaced = {param for tensor in variants for param in tensor.params}
        return [row for row in self._published() if not replaced & set(row.params)] + variants

    def _published(self) -> list[Tensor]:
        table = [rows(self.embedding, "embedding", aliases=self.embedding_aliases)]
        for i, block in enumerate(self.tables):
            prefix = self.layers.format(i)
            table += [tensor.inside(prefix, f"backbone.block_{i}.") for tensor in block]
        table += norm(self.final_norm, "backbone.final_norm", self.norm)
        table += self.extra
        if not self.tie_embeddings:
            table.append(Tensor(self.head, ("head",)))
        return table


Size = tuple[str, tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      build: function of the config and the capacity of attention caches.
      prefixes: the prefixes of tensor names ("@" in the table), the most specific first.
      ignored: regular expressions of tensors that are not read.
      text: the field that holds the config of the text model, for checkpoints that also have
        images.
      sizes: sizes that the config may omit, as (field of the config, names of a tensor, its axis).
        The first stored tensor has the size.
    """

    build: Callable[[Config, int], Architecture]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    text: str | None = None
    sizes: tuple[Size, ...] = ()

    def sizes_of(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[str, int], ...]:
        """Return the fields of `sizes` with their values in a checkpoint."""
        found = []
        for field, names, axis in self.sizes:
            stored = (name.replace("@", prefix) for name in names)
            shape = next((shapes[name] for name in stored if name in shapes), ())
            if axis < len(shape):
                found.append((field, shape[axis]))
        return tuple(found)

    def config(self, values: dict[str, Any]) -> Config:
        """Return the config of the text model."""
        config = Config(values)
        if self.text is None or not config.has(self.text):
            return config
        outer = {name: values[name] for name in ("tie_word_embeddings",) if name in values}
        return Config({**config.inner(self.text).values, **outer})

    def prefix(self, names: Iterable[str]) -> str:
        """Return the prefix that the names of a checkpoint have."""
        names = list(names)
        found = (p for p in self.prefixes if any(name.startswith(p) for name in names))
        return next(found, self.prefixes[-1])

    def ignores(self, name: str) -> bool:
        """Return whether a tensor is not read."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def _with_cache_dtype(layer: Any, dtype: str) -> Any:
    """Return a layer whose attention, and that of its sublayers, has caches of a dtype."""
    if isinstance(layer, tuple):
        return tuple(_with_cache_dtype(entry, dtype) for entry in layer)
    if not isinstance(layer, Layer):
        return layer
    made: Any = layer
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    changed = {name: _with_cache_dtype(value, dtype) for name, value in fields.items()}
    if "cache_dtype" in fields:
        changed["cache_dtype"] = dtype
    changed = {name: value for name, value in changed.items() if value is not fields[name]}
    return dataclasses.replace(made, **changed) if changed else made


def norm(stored: str, ours: str, kind: NormKind) -> list[Tensor]:
    """Return the tensors of a norm: a weight, and the bias of a layer norm."""
    table = [rows(f"{stored}.weight", f"{ours}.scale")]
    if kind == "layer":
        table.append(rows(f"{stored}.bias", f"{ours}.bias"))
    return table
