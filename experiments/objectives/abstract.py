"""Objectives without data and without weights, to compile a training step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.base import build
from experiments.objectives.finetune import NextToken
from experiments.objectives.language import NextByte
from seqjax import pretrained


@dataclasses.dataclass(frozen=True)
class Abstract:
    """An objective with shapes in place of arrays.

    Attributes:
      objective: the model and its loss.

      params: shapes of the first trained parameters.

      frozen: shapes of the parameters that are not trained; None without.

      batch: dtype of each array [B, T] of a batch.
    """

    objective: NextByte | NextToken
    params: Any
    frozen: Any
    batch: dict[str, Any]


def make(config: ConfigDict) -> Abstract:
    """Return the objective of a configuration of text, or of `config.published`."""
    if "published" not in config:
        text = NextByte(build.build_model(config.model))
        params = jax.eval_shape(text.model.init, jax.random.key(0))
        batch = {"inputs": jnp.uint8, "targets": jnp.uint8, "segment_ids": jnp.int32}
        return Abstract(text, params, None, batch)
    model = pretrained.read_model(
        config.published.config.to_dict(),
        config.model.dtype,
        capacity=config.data.length,
        scan=config.model.scan,
        remat=config.model.remat,
    )
    tokens = NextToken(model, config.model.lora_rank, config.model.lora_alpha)
    stored = pretrained.abstract_params(model)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), jnp.int32) | {"counted": bool}
    if tokens.adapter is None:
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), stored)
        return Abstract(tokens, wide, None, batch)
    adapters = jax.eval_shape(tokens.adapter.init, jax.random.key(0))
    return Abstract(tokens, adapters, stored, batch)
