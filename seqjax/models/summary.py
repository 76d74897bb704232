"""Summary of a model: parameter counts and state sizes per block."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers._base import Layer
from seqjax.models.backbone import Backbone
from seqjax.models.block import Block


def summary(model: Layer) -> str:
    """Return a table of the parameters and the state of each part of a model.

    Args:
      model: any layer or model.

    Returns:
      One line per block and per other part: its layers, its number of parameters, and the bytes of
      its state for one sequence in float32. The last line has the sums.

    Raises:
      ValueError: if `model` is not a layer or model.

    Example:
      >>> from seqjax.layers import LRU
      >>> from seqjax.models import Backbone, LanguageModel
      >>> print(summary(LanguageModel(16, Backbone(LRU(dim=8), depth=2, mlp_ratio=2))))
      part        layers          parameters  state bytes
      embedding                          128            -
      block_0     LRU + GatedMLP         688           64
      block_1     LRU + GatedMLP         688           64
      final_norm  RMSNorm                  8            -
      total                            1,512          128
    """
    if not isinstance(model, Layer):
        raise ValueError(
            "summary: `model` must be a layer or model of seqjax, got"
            f" {type(model).__name__}; pass the model, not its parameters."
        )
    rows = _rows(model)
    total = (
        "total",
        "",
        sum(parameters for _, _, parameters, _ in rows),
        sum(size for *_, size in rows),
    )
    cells = [("part", "layers", "parameters", "state bytes")] + [
        (name, layers, f"{parameters:,}", f"{size:,}" if size else "-")
        for name, layers, parameters, size in (*rows, total)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip()
        for a, b, c, d in cells
    )


def _rows(model: Layer) -> list[tuple[str, str, int, int]]:
    rows = []
    for name, entry in model.declare_params().items():
        if isinstance(entry, Backbone):
            for i, block in enumerate(entry.stack):
                rows.append((f"block_{i}", _describe(block), _parameters(block), _bytes(block)))
            declared = entry.declare_params()
            shared, norm = declared.get("shared"), declared["final_norm"]
            if isinstance(shared, Layer):
                rows.append(("shared", ", ".join(shared.declare_params()), _parameters(shared), 0))
            assert isinstance(norm, Layer)
            rows.append(("final_norm", type(norm).__name__, _parameters(norm), 0))
        elif isinstance(entry, Layer):
            rows.append((name, type(entry).__name__, _parameters(entry), _bytes(entry)))
        else:
            rows.append((name, "", math.prod(entry.shape), 0))
    return rows


def _describe(block: Block) -> str:
    others = (block.mlp, block.injection)
    parts = [*block.mixers.values(), *(part for part in others if part is not None)]
    return " + ".join(type(part).__name__ for part in parts)


def _parameters(layer: Layer) -> int:
    shapes = jax.tree.leaves(layer.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return sum(math.prod(shape) for shape in shapes)


def _bytes(layer: Layer) -> int:
    if not layer.causal:
        return 0
    state: Any = jax.eval_shape(lambda: layer.make_state(1, jnp.float32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
