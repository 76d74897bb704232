"""Learned initial states: a flag in the state tells whether no step has been taken yet."""

import jax
import jax.numpy as jnp

from seqjax.ops.core import sequence_parallel


def starts(
    fresh: jax.Array, reset: jax.Array | None, length: int, sequence_axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return the steps [B, T] that follow the learned initial state, and the new flag.

    These are the steps with a reset, and the first step of a fresh state. Add the transition of
    the learned state to the input there, and leave the carried state at zero.

    Args:
      fresh: [B] bool, whether no step has been taken since the state was made.
      reset: [B, T] bool of this device's shard, or None.
      length: T of this device's shard.
      sequence_axis: a mesh axis, in the order of time, or None.
    """
    here = fresh
    if sequence_axis is not None:
        here = fresh & sequence_parallel.is_first(sequence_axis)
    found = here[:, None] & (jnp.arange(length) == 0)
    found = found if reset is None else found | reset
    if sequence_axis is not None:
        return found, jnp.zeros_like(fresh)
    # Always False. Unlike a constant, it is split over devices as the batch is.
    return found, fresh & ~found.any(axis=1)
