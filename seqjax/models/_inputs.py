"""What the models share: token embeddings and checks at construction."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, state_dtype
from seqjax.models.backbone import Backbone
from seqjax.ops.core.custom_adjoint import custom_adjoint


def embedding(vocab_size: int, dim: int) -> Param:
    """The embedding table, normal with variance 1/dim."""
    return Param((vocab_size, dim), ("vocab", "embed"), "embedding", _init.normal(dim**-0.5))


def whole(weight: jax.Array, backbone: Backbone) -> jax.Array:
    """A table of the vocabulary, put together on every device of a mesh before it is used.

    Looked up where features are split, rows come out split likewise, and every device's batch
    has to be put together to take them apart by sequences. Looked up where the vocabulary is
    split, XLA's partitioner crashes once another axis is manual (jax 0.10.2).
    """
    return weight if backbone.constrain is None else backbone.constrain(weight, (None, None))


def embed(table: jax.Array, tokens: jax.Array, dtype: Any, backbone: Backbone) -> jax.Array:
    """Rows of the table, scaled to unit variance; NaN for a token outside the vocabulary."""
    lookup = _rows if backbone.constrain is None else _rows_on_mesh
    return lookup(table, tokens).astype(dtype) * table.shape[1] ** 0.5


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _sum_of_rows(args: tuple[jax.Array, jax.Array], rows: jax.Array) -> list[jax.Array]:
    """What the rows of each token add up to, as a product.

    The transpose of a lookup adds rows at computed places, for which XLA's partitioner brings the
    rows of all devices to each of them where another axis is manual: 16 GB a chip in a model of
    7 billion parameters with windows of 131,072 bytes.
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
    """Checks a model's backbone and dtype and gives the model the backbone's `dim`."""
    _checks.require(
        model,
        isinstance(backbone, Backbone),
        f"backbone must be a seqjax.models.Backbone, given {backbone!r}.",
    )
    object.__setattr__(model, "dtype", _checks.float_dtype(model, dtype).name)
    object.__setattr__(model, "dim", backbone.dim)
