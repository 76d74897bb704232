"""Losses of the positions that count, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Each = Callable[[jax.Array, jax.Array], jax.Array]


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the squared error of outputs [B, T, 1] at each position of targets [B, T]."""
    return jnp.square(outputs[..., 0] - targets)


def counted_nats(
    model: Any,
    params: Any,
    batch: dict[str, jax.Array],
    sequence_axis: str | None,
    each: Each = optax.softmax_cross_entropy_with_integer_labels,
) -> tuple[jax.Array, jax.Array]:
    """Return the total loss over the counted positions, and their number.

    Args:
      model: the model.

      params: its parameters.

      batch: `inputs`, `targets`, `counted` and `reset`, each [B, T].

      sequence_axis: the mesh axis that time is split over, or None; totals are over all of time.

      each: loss at each position from outputs and targets; by default the log-loss in nats.
    """
    logits, _ = model.apply(
        params, batch["inputs"], reset=batch["reset"], sequence_axis=sequence_axis
    )
    losses = each(logits, batch["targets"])
    counted = batch["counted"]
    total, count = jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted)
    if sequence_axis is not None:
        total, count = jax.lax.psum((total, count), sequence_axis)
    return total, count


def counted_mean(
    model: Any,
    params: Any,
    batch: dict[str, jax.Array],
    sequence_axis: str | None,
    each: Each = optax.softmax_cross_entropy_with_integer_labels,
) -> jax.Array:
    """Return the mean loss over the counted positions; 0 if there are none."""
    total, count = counted_nats(model, params, batch, sequence_axis, each)
    return total / jnp.maximum(count, 1)


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss in nats, at most exp(700): more is no float."""
    return math.exp(min(nats, 700.0))
