"""What the models share: token embeddings and checks at construction."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param
from seqjax.models.backbone import Backbone


def embedding(vocab_size: int, dim: int) -> Param:
    """The embedding table, normal with variance 1/dim."""
    return Param((vocab_size, dim), ("vocab", "embed"), "embedding", _init.normal(dim**-0.5))


def whole(weight: jax.Array, backbone: Backbone) -> jax.Array:
    """A table of the vocabulary, put together on every device of a mesh before it is used.

    Looked up where features are split, rows come out split likewise, and every device's batch
    has to be put together to take them apart by sequences. Looked up where the vocabulary is
    split, XLA's partitioner crashes once another axis is manual (jax 0.10.2).
    """
    return weight if backbone.place is None else backbone.place(weight, (None, None))


def embed(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the embedding, scaled to unit variance; NaN for a token outside the vocabulary."""
    rows = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(dtype) * table.shape[1] ** 0.5


def check_model(model: Layer, backbone: Backbone, dtype: str) -> None:
    """Checks a model's backbone and dtype and gives the model the backbone's `dim`."""
    _checks.require(
        model,
        isinstance(backbone, Backbone),
        f"backbone must be a seqjax.models.Backbone, given {backbone!r}.",
    )
    object.__setattr__(model, "dtype", _checks.float_dtype(model, dtype).name)
    object.__setattr__(model, "dim", backbone.dim)
