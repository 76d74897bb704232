"""AdamW with warm-up and cosine decay, and a smaller learning rate for recurrence parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from experiments.base.errors import UserError


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Return linear warm-up to `learning_rate`, then cosine decay to `final_fraction` of it."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        # A learning rate of zero would waste the first step.
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: ConfigDict, steps: int, roles: Any) -> optax.GradientTransformation:
    """Build the optimizer; `roles` is the model's tree of parameter roles.

    Weight decay applies to weights, not to biases, norms, embeddings and recurrence parameters.
    The learning rate of recurrence parameters is multiplied by `recurrence_rate`, because
    eigenvalues near the unit circle are sensitive, as the papers on LRU and S5 found.
    """
    if config.learning_rate <= 0:
        raise UserError(f"config.optimizer.learning_rate={config.learning_rate}: must be positive")
    decays = jax.tree.map(lambda role: role == "weight", roles)
    groups = jax.tree.map(lambda role: "recurrence" if role == "recurrence" else "other", roles)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.multi_transform(
            {"recurrence": optax.scale(config.recurrence_rate), "other": optax.identity()}, groups
        ),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
