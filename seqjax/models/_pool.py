"""Pool of a classifier: the sum or last of the positions since the last reset, in one pass."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import sequence_parallel

Pool = dict[str, jax.Array]


def empty(batch_size: int, dim: int, dtype: jnp.dtype) -> Pool:
    """Return an empty pool: the sum of positions (the last one if kind='last') and their number."""
    return {
        "sum": jnp.zeros((batch_size, dim), dtype),
        "count": jnp.zeros((batch_size,), jnp.int32),
    }


def update(
    pool: Pool,
    hidden: jax.Array,
    mask: jax.Array | None,
    reset: jax.Array,
    kind: Literal["mean", "last"],
    sequence_axis: str | None,
) -> Pool:
    """Return the pool after `hidden` [B, T, dim] at the positions of `mask`, cleared by `reset`."""
    keep = _since_last(reset, mask)
    carried = ~reset.any(axis=1)
    found = keep.any(axis=1)
    if sequence_axis is not None:
        cut_later, found_later = _later((~carried, found), sequence_axis)
        keep, found = keep & ~cut_later[:, None], found & ~(cut_later | found_later)
    count = jnp.sum(keep, axis=1, dtype=jnp.int32)
    if kind == "mean":
        total = jnp.sum(jnp.where(keep[..., None], hidden, 0), axis=1)
    else:
        last = jnp.max(jnp.where(keep, jnp.arange(keep.shape[1]), 0), axis=1)
        chosen = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        total = jnp.where(found[:, None], chosen, 0)
    if sequence_axis is not None:
        total, count = lax.psum((total, count), sequence_axis)
        carried = lax.psum(jnp.astype(~carried, jnp.int32), sequence_axis) == 0
        found = lax.psum(jnp.astype(found, jnp.int32), sequence_axis) > 0
    old = carried if kind == "mean" else carried & ~found
    return {
        "sum": total + jnp.where(old[:, None], pool["sum"], 0),
        "count": count + jnp.where(carried, pool["count"], 0),
    }


def counted_before(
    mask: jax.Array, reset: jax.Array, count: jax.Array, sequence_axis: str
) -> jax.Array:
    """Count the real positions [B] before this device's shard and since the last reset."""

    def compose(
        early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return jnp.where(late[1], late[0], early[0] + late[0]), early[1] | late[1]

    own = jnp.sum(_since_last(reset, mask), axis=1, dtype=jnp.int32), reset.any(axis=1)
    before, cut = sequence_parallel.combine_before(own, compose, sequence_axis)
    before = jnp.where(cut, before, count + before)
    return jnp.where(sequence_parallel.is_first(sequence_axis), count, before)


def _since_last(reset: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the positions [B, T] of the mask that no reset follows."""
    segment = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    keep = segment == segment[:, -1:]
    return keep if mask is None else keep & mask


def _later(flags: tuple[jax.Array, ...], sequence_axis: str) -> tuple[jax.Array, ...]:
    """Return whether each flag [B] is set on a device later in time."""

    def either(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(a | b for a, b in zip(one, other, strict=True))

    later = sequence_parallel.combine_before(flags, either, sequence_axis, reverse=True)
    is_last = sequence_parallel.is_first(sequence_axis, reverse=True)
    return tuple(flag & ~is_last for flag in later)
