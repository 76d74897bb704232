"""Sequence parallelism: the collectives of recurrences whose T is split over a mesh axis.

Each device computes a summary of its sequence shard, of the size of the state. A prefix scan over
the devices gives every device the summary of all earlier shards, and so the state at the start of
this device's shard. It takes ceil(log2 n) exchanges of one summary each.

For linear recurrences the summary is the shard as an affine map of the state,

    S_out = M S_in + X,     or the constant X if a reset lies in the shard.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import jax_compat
from seqjax.types import PyTree

T = TypeVar("T")


def _position(axis_name: str, reverse: bool) -> tuple[int, jax.Array]:
    """Return the number of sequence shards, and this device's index in the direction of time."""
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    return size, size - 1 - index if reverse else index


def is_first(axis_name: str, reverse: bool = False) -> jax.Array:
    """Return whether the sequence starts on this device."""
    return _position(axis_name, reverse)[1] == 0


def combine_before(
    summary: T, compose: Callable[[T, T], T], axis_name: str, reverse: bool = False
) -> T:
    """Return the composed summaries of all earlier devices; undefined on the first device."""
    size, position = _position(axis_name, reverse)

    def receive(value: T, distance: int) -> T:
        links = [(i, i + distance) for i in range(size - distance)]
        return lax.ppermute(value, axis_name, [(j, i) for i, j in links] if reverse else links)

    def select(mask: jax.Array, new: T, old: T) -> T:
        return jax.tree.map(lambda new, old: jnp.where(mask, new, old), new, old)

    distance = 1
    while distance < size:
        has_earlier = position >= distance
        # Replace the zeros that the first devices receive before `compose`, not only after it: its
        # derivative at zero may not be finite.
        early = select(has_earlier, receive(summary, distance), summary)
        summary = select(has_earlier, compose(early, summary), summary)
        distance *= 2
    return receive(summary, 1)


class Affine(NamedTuple):
    """Affine map of a state, S -> where(cut, 0, M S) + X."""

    transition: jax.Array  # M
    offset: jax.Array  # X
    cut: jax.Array  # bool, broadcastable to X


def run_split(
    local: Callable[[jax.Array], tuple[Any, jax.Array]],
    transition: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None,
    axis_name: str,
    *,
    reverse: bool = False,
    apply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
) -> tuple[Any, jax.Array]:
    """Run a recurrence whose T is split over the mesh axis `axis_name`.

    Args:
      local: maps the state before this device's shard to (outputs, state after it).
      transition: M of this device's shard; ignored where a reset lies in the shard.
      initial_state: [B, ...], before the whole sequence; the same on every device.
      reset: [B, T] of this device's shard.
      axis_name: a mesh axis, in the order of time.
      reverse: time runs from the last device to the first.
      apply: M S, where S is a state or another M.

    Returns:
      This device's outputs, and the final state of the whole sequence, on every device.
    """
    _, offset = local(jnp.zeros_like(initial_state))
    batch = initial_state.shape[0]
    cut = jnp.zeros(batch, bool) if reset is None else reset.any(axis=1)
    cut = cut.reshape(batch, *(1 for _ in initial_state.shape[1:]))

    def onward(late: Affine, state: jax.Array) -> jax.Array:
        """Return M S, or zero if a reset lies in `late`; there M and S may not be finite."""
        return apply(*(jnp.where(late.cut, jnp.zeros_like(x), x) for x in (late.transition, state)))

    def compose(early: Affine, late: Affine) -> Affine:
        return Affine(
            onward(late, early.transition),
            onward(late, early.offset) + late.offset,
            early.cut | late.cut,
        )

    before = combine_before(Affine(transition, offset, cut), compose, axis_name, reverse)
    first = is_first(axis_name, reverse)
    before = before._replace(cut=before.cut | first)
    entered = onward(before, initial_state) + before.offset
    entered = jnp.where(first, initial_state, entered)
    outputs, final = local(entered)
    return outputs, from_last(final, axis_name, reverse)


def in_turn(
    local: Callable[[PyTree], tuple[PyTree, PyTree]], state: PyTree, axis_name: str
) -> tuple[PyTree, PyTree]:
    """Return the outputs of this device's shard, and the state after the whole sequence.

    For recurrences without a summary of a shard: each device runs after the one before it. `local`
    maps the state before a shard to (outputs, state after it).
    """
    out, final = local(_before_shard(local, state, axis_name))
    return out, from_last(final, axis_name)


def _before_shard(
    local: Callable[[PyTree], tuple[PyTree, PyTree]], state: PyTree, axis_name: str
) -> PyTree:
    """Return the state before this device's shard."""
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    links = [(i, i + 1) for i in range(size - 1)]

    def turn(entered: PyTree, number: jax.Array) -> tuple[PyTree, None]:
        final = lax.cond(index == number, lambda s: local(s)[1], lambda s: s, entered)
        received = jax.tree.map(lambda s: lax.ppermute(s, axis_name, links), final)
        return jax.tree.map(
            lambda new, old: jnp.where(index == number + 1, new, old), received, entered
        ), None

    # Checkpointed: the stored residuals are one state per turn.
    turn = jax.checkpoint(turn, prevent_cse=False)
    return lax.scan(turn, state, jnp.arange(size - 1, dtype=index.dtype))[0]


def whole_part(values: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Return per-step exponents [B, T, ...], zero in sequences with a reset in this shard.

    The transition of such a shard is never used. If non-finite values stayed in its sum, they would
    reach the gradients of steps after the reset.
    """
    if reset is None:
        return values
    cut = reset.any(axis=1).reshape(-1, *(1 for _ in values.shape[1:]))
    return jnp.where(cut, jnp.zeros_like(values), values)


def from_last(state: T, axis_name: str, reverse: bool = False) -> T:
    """Return the value of the device where the sequence ends, on every device."""
    size, position = _position(axis_name, reverse)

    def share(s: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(s):  # see `jax_compat.match_varying`
            return lax.complex(*map(share, jax_compat.parts(s)))
        if s.dtype == bool:  # a sum has no booleans
            return share(s.astype(jnp.int32)).astype(bool)
        return lax.psum(jnp.where(position == size - 1, s, jnp.zeros_like(s)), axis_name)

    return jax.tree.map(share, state)


def previous(
    h0: jax.Array,
    states: jax.Array,
    reset: jax.Array | None,
    axis_name: str | None = None,
    fill: float = 0.0,
) -> jax.Array:
    """Return the state [B, T, ...] before each step: the one a step earlier, `fill` at a reset."""
    if axis_name is not None:
        size = lax.axis_size(axis_name)
        links = [(i, i + 1) for i in range(size - 1)]
        received = lax.ppermute(states[:, -1], axis_name, links)
        h0 = jnp.where(is_first(axis_name), h0, received)
    earlier = jnp.concatenate([h0[:, None], states[:, :-1]], axis=1)
    if reset is None:
        return earlier
    reset = reset.reshape(*reset.shape, *(1 for _ in earlier.shape[2:]))
    return jnp.where(reset, jnp.full_like(earlier, fill), earlier)
