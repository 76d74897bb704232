"""Sequence parallelism: what devices tell each other when T is split over a mesh axis.

Each device summarises its part of the sequence in one state-sized piece. A prefix combination
over the devices, ceil(log2 n) exchanges of one summary each, gives every device the summary of
all that came before it, and from that the state that enters its part.

For the linear recurrences a summary is the affine map of the state that the part amounts to,

    S_out = M S_in + X,     or the constant X if a reset lies in the part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import jax_compat

T = TypeVar("T")


def _place(axis_name: str, reverse: bool) -> tuple[int, jax.Array]:
    """How many devices share the sequence, and this one's place in the direction of time."""
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    return size, size - 1 - index if reverse else index


def is_first(axis_name: str, reverse: bool = False) -> jax.Array:
    """Whether time starts on this device."""
    return _place(axis_name, reverse)[1] == 0


def combine_before(
    summary: T, compose: Callable[[T, T], T], axis_name: str, reverse: bool = False
) -> T:
    """The composition of the summaries of all earlier devices; meaningless on the first device."""
    size, place = _place(axis_name, reverse)

    def receive(value: T, distance: int) -> T:
        links = [(i, i + distance) for i in range(size - distance)]
        return lax.ppermute(value, axis_name, [(j, i) for i, j in links] if reverse else links)

    def select(mask: jax.Array, new: T, old: T) -> T:
        return jax.tree.map(lambda new, old: jnp.where(mask, new, old), new, old)

    distance = 1
    while distance < size:
        has_earlier = place >= distance
        # The zeros that a first device receives are replaced before `compose`, not only after it:
        # its derivative there may not be finite.
        early = select(has_earlier, receive(summary, distance), summary)
        summary = select(has_earlier, compose(early, summary), summary)
        distance *= 2
    return receive(summary, 1)


class Affine(NamedTuple):
    """S -> where(cut, 0, M S) + X."""

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
      local: maps the state entering this device's part to (outputs, state leaving it).
      transition: M of this device's part; anything where a reset lies in the part.
      initial_state: [B, ...], before the whole sequence; the same on every device.
      reset: [B, T] of this device's part.
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
        """Return M S, and zero where a reset lies in `late`, where M and S may not be finite."""
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


def whole_part(values: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Per-step exponents [B, T, ...], zero in sequences whose part holds a reset.

    Their transition is never used, and summed as they are, non-finite values would come back in
    the gradients of steps after the reset.
    """
    if reset is None:
        return values
    cut = reset.any(axis=1).reshape(-1, *(1 for _ in values.shape[1:]))
    return jnp.where(cut, jnp.zeros_like(values), values)


def from_last(state: T, axis_name: str, reverse: bool = False) -> T:
    """The value on the device where time ends, on every device."""
    size, place = _place(axis_name, reverse)

    def share(s: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(s):  # see `jax_compat.match_varying`
            return lax.complex(*map(share, jax_compat.parts(s)))
        return lax.psum(jnp.where(place == size - 1, s, jnp.zeros_like(s)), axis_name)

    return jax.tree.map(share, state)


def previous(
    h0: jax.Array, states: jax.Array, reset: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """The state that each step [B, T] finds: the one before it, zero after a reset."""
    if axis_name is not None:
        size = lax.axis_size(axis_name)
        links = [(i, i + 1) for i in range(size - 1)]
        received = lax.ppermute(states[:, -1], axis_name, links)
        h0 = jnp.where(is_first(axis_name), h0, received)
    found = jnp.concatenate([h0[:, None], states[:, :-1]], axis=1)
    return jnp.where(
        reset.reshape(*reset.shape, *(1 for _ in found.shape[2:])), jnp.zeros_like(found), found
    )
