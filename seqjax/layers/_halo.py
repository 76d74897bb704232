"""Halo exchange: the steps before a sequence shard, for layers that read a few earlier steps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import sequence_parallel


def entering(state: Any, x: Any, reset: jax.Array | None, axis_name: str) -> Any:
    """Return the last steps before this device's shard, in the form of the layer's state.

    Each device sends its last steps to the next device. If a shard is shorter than the window of
    earlier steps, it sends them to later devices as well.

    Args:
      state: a tree of arrays [B, P, ...], the P steps before the whole sequence, oldest first.
      x: the same tree [B, T, ...] of this device's shard.
      reset: [B, T] of this device's shard.
      axis_name: a mesh axis, in the order of time.

    Returns:
      The tree of `state`, the P steps before this shard, zero (False) if a reset lies between.
    """
    past = jax.tree.leaves(state)[0].shape[1]
    if past == 0:
        return state
    found = jax.tree.map(lambda s, z: _steps_before(s, z, axis_name), state, x)
    if reset is None:
        return found
    none = jnp.zeros((reset.shape[0], past), jnp.bool_)
    cleared = _steps_before(none, reset, axis_name)
    # True where a reset follows a step: the maximum over the resets of later steps.
    later = lax.cummax(cleared.astype(jnp.int32), axis=1, reverse=True)[:, 1:] > 0
    cut = jnp.pad(later, ((0, 0), (0, 1)))
    return jax.tree.map(
        lambda s: jnp.where(cut.reshape(*cut.shape, *(1,) * (s.ndim - 2)), jnp.zeros_like(s), s),
        found,
    )


def _steps_before(state: jax.Array, x: jax.Array, axis_name: str) -> jax.Array:
    """Return the P steps before this shard: received, or from `state` at the sequence's start."""
    past, length = state.shape[1], x.shape[1]
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    received: list[jax.Array] = []
    for distance in range(1, -(-past // length) + 1):
        wanted = min(length, past - (distance - 1) * length)
        rows = x[:, length - wanted :]
        if distance < size:
            links = [(i, i + distance) for i in range(size - distance)]
            rows = lax.ppermute(rows, axis_name, links)
        received.insert(0, rows)
    steps = jnp.concatenate(received, axis=1).astype(state.dtype)
    # Row j is step index * length - past + j of the whole sequence.
    place = index * length + jnp.arange(past, dtype=jnp.int32)
    before = jnp.take(state, jnp.minimum(place, past - 1), axis=1)
    from_state = (place < past).reshape(1, past, *(1,) * (state.ndim - 2))
    return jnp.where(from_state, before, steps)


def leaving(state: Any, axis_name: str) -> Any:
    """Return the state of the device where time ends, on every device."""
    return sequence_parallel.from_last(state, axis_name)


def last_before(x: jax.Array, axis_name: str) -> jax.Array:
    """Return the last step [B, 1, ...] of the previous shard; zero (False) on the first device."""
    return _neighbour(x[:, -1:], axis_name, 1)


def first_after(x: jax.Array, axis_name: str) -> jax.Array:
    """Return the first step [B, 1, ...] of the next shard; zero (False) on the last device."""
    return _neighbour(x[:, :1], axis_name, -1)


def _neighbour(x: jax.Array, axis_name: str, distance: int) -> jax.Array:
    size = lax.axis_size(axis_name)
    links = [(i, i + distance) for i in range(size) if 0 <= i + distance < size]
    return lax.ppermute(x, axis_name, links)  # zeros where nothing arrives
