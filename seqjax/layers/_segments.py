"""Resets made from segment ids."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _halo


def to_reset(
    layer: object, segment_ids: Any, reset: Any, shape: tuple[int, ...], sequence_axis: str | None
) -> jax.Array:
    """Return [B, T] bool: True where the segment id differs from the one a step earlier.

    The first step of the whole sequence is False, because it continues from the initial state.
    """
    _checks.require(layer, reset is None, "must get `reset` or `segment_ids`, got both.")
    ids = jnp.asarray(segment_ids)
    _checks.require(
        layer,
        ids.shape == shape and jnp.issubdtype(ids.dtype, jnp.integer),
        f"`segment_ids` must be integers of shape {list(shape)}, got {ids.dtype} of shape"
        f" {list(ids.shape)}.",
    )
    if sequence_axis is None:
        before = ids[:, :1]
    else:
        first = jax.lax.axis_index(sequence_axis) == 0
        before = jnp.where(first, ids[:, :1], _halo.last_before(ids, sequence_axis))
    return ids != jnp.concatenate([before, ids[:, :-1]], axis=1)
