"""Dropout: random zeros during training."""

import jax
import jax.numpy as jnp

from seqjax.layers._checks import require
from seqjax.layers.context import Context


def check_rate(layer: object, name: str, rate: float) -> None:
    """Check that a dropout rate lies in [0, 1)."""
    require(layer, 0 <= rate < 1, f"`{name}` must be in [0, 1), got {rate}.")


def dropout(x: jax.Array, rate: float, context: Context) -> jax.Array:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate).

    Without a key in the context, or with a rate of 0, return `x` unchanged
    (Srivastava et al., Dropout, 2014).
    """
    key = context.enter("dropout").local_key() if rate else None
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))
