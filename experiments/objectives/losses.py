"""Log-loss of the positions that count, and perplexity."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def counted_nats(
    model: Any, params: Any, batch: dict[str, jax.Array], sequence_axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return the total log-loss in nats over the counted positions, and their number.

    Args:
      model: the model.

      params: its parameters.

      batch: `inputs`, `targets`, `counted` and `reset`, each [B, T].

      sequence_axis: the mesh axis that time is split over, or None; totals are over all of time.
    """
    logits, _ = model.apply(
        params, batch["inputs"], reset=batch["reset"], sequence_axis=sequence_axis
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    counted = batch["counted"]
    total, count = jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted)
    if sequence_axis is not None:
        total, count = jax.lax.psum((total, count), sequence_axis)
    return total, count


def counted_mean(
    model: Any, params: Any, batch: dict[str, jax.Array], sequence_axis: str | None
) -> jax.Array:
    """Return the mean log-loss over the counted positions; 0 if there are none."""
    total, count = counted_nats(model, params, batch, sequence_axis)
    return total / jnp.maximum(count, 1)


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss in nats, at most exp(700): more is no float."""
    return math.exp(min(nats, 700.0))
