"""Token embeddings and construction checks that the models share."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, state_dtype
from seqjax.models.backbone import Backbone
from seqjax.ops.core.custom_adjoint import custom_adjoint


def embedding(vocab_size: int, dim: int) -> Param:
    """Return the declaration of an embedding table, normal with variance 1/dim."""
    return Param((vocab_size, dim), ("vocab", "embed"), "embedding", _init.normal(dim**-0.5))


def whole(weight: jax.Array, backbone: Backbone) -> jax.Array:
    """Gather a table of the vocabulary on every device of a mesh, before it is used.

    A lookup in a table with split features returns split rows, and splitting them by sequences
    instead gathers the batch of every device. A lookup in a table with a split vocabulary crashes
    XLA's partitioner if another axis is manual (jax 0.10.2).
    """
    return weight if backbone.constrain is None else backbone.constrain(weight, (None, None))


def embed(
    table: jax.Array, tokens: jax.Array, dtype: Any, backbone: Backbone, scale: float | None = None
) -> jax.Array:
    """Look up rows of the table, times `scale`; NaN outside the vocabulary.

    The default scale, sqrt(dim), gives the rows of an initial table unit variance.
    """
    lookup = _rows if backbone.constrain is None else _rows_on_mesh
    rows = lookup(table, tokens).astype(dtype)
    return rows * (table.shape[1] ** 0.5 if scale is None else scale)


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _sum_of_rows(args: tuple[jax.Array, jax.Array], rows: jax.Array) -> list[jax.Array]:
    """Sum the rows of each token, as a matrix product.

    The transpose of a lookup adds rows at computed positions. If another axis is manual, XLA's
    partitioner gathers the rows of all devices on every device for it. In a model of 7 billion
    parameters with windows of 131,072 bytes these are 16 GB per chip.
    """
    table, tokens = args
    chosen = jax.nn.one_hot(tokens, len(table), dtype=rows.dtype)
    return [
        jnp.tensordot(
            chosen,
            rows,
            axes=(list(range(tokens.ndim)),) * 2,
            precision="highest",
            preferred_element_type=state_dtype(rows.dtype),
        ).astype(table.dtype)
    ]


_rows_on_mesh = custom_adjoint(_rows, _sum_of_rows)


def check_model(model: Layer, backbone: Backbone, dtype: str) -> None:
    """Check a model's backbone and dtype, and set the model's `dim` to the backbone's."""
    _checks.require(
        model,
        isinstance(backbone, Backbone),
        f"`backbone` must be a seqjax.models.Backbone, got {backbone!r}.",
    )
    object.__setattr__(model, "dtype", _checks.float_dtype(model, dtype).name)
    object.__setattr__(model, "dim", backbone.dim)
