"""Exponential gates and normalizers, as arguments of recurrences that cannot overflow."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqjax.layers.context import Context
from seqjax.ops.elementwise.log_scan import log_scan
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.previous import previous


class Stabilized(NamedTuple):
    """A recurrence u_t = f_t u_{t-1} + exp(i_t) x_t, scaled by exp(-m_t).

    Attributes:
      log_decay: log f_t + m_{t-1} - m_t, at most 0.
      weight: exp(i_t - m_t), at most 1.
      before: m_{t-1}, `fresh` after a reset.
      maximum: m_t.
      last: m at the end of the sequence, a part of the layer's state.
    """

    log_decay: jax.Array
    weight: jax.Array
    before: jax.Array
    maximum: jax.Array
    last: jax.Array


def stabilize(
    log_decay: jax.Array | None,
    log_weight: jax.Array,
    start: jax.Array,
    context: Context,
    *,
    fresh: float = -math.inf,
    read: bool = False,
) -> Stabilized:
    """Return the scaled form of a recurrence with an exponential input gate.

        u_t = f_t u_{t-1} + exp(i_t) x_t             |i_t| of any size
        m_t = max(m_{t-1} + log f_t, i_t)            m_0 = start, -inf at the beginning

    u_t exp(-m_t) is a recurrence with decays and weights of at most 1. The exact result does not
    depend on m. So m carries no gradient, which leaves all derivatives exact, as long as the layer
    reads u_t exp(-m_t) and m_t together. If the result depends on m, pass `read=True`.

    Args:
      log_decay: log f_t, [B, T, D], or [D] where it is constant; None for f_t = 1.
      log_weight: i_t [B, T, D], in the state dtype.
      start: m_0 [B, D], the `last` of the call before.
      context: resets and the sequence axis.
      fresh: m before the first step after a reset.
      read: whether m carries gradients.
    """
    entering = log_weight
    if fresh > -math.inf and context.reset is not None:
        decayed = jnp.full((), fresh) if log_decay is None else fresh + log_decay
        at_reset = jnp.maximum(decayed.astype(log_weight.dtype), log_weight)
        entering = jnp.where(context.reset[..., None], at_reset, log_weight)
    stop = (lambda value: value) if read else jax.lax.stop_gradient
    maximum, last = log_scan(
        None if log_decay is None else stop(log_decay),
        stop(entering),
        stop(start),
        semiring="max",
        reset=context.reset,
        sequence_axis=context.sequence_axis,
    )
    # `start` keeps its gradient here: it scales the state that a call continues from.
    before, _ = previous(maximum, start, context.reset, context.sequence_axis, fill=fresh)
    decay = before - maximum if log_decay is None else log_decay + before - maximum
    return Stabilized(decay, jnp.exp(log_weight - maximum), before, maximum, last)


def normalized_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    state: dict[str, jax.Array],
    context: Context,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Run `linear_attention` with its normalizer, on the state of a layer.

        S_t = decay_t S_{t-1} + k_t v_t^T,    n_t = decay_t n_{t-1} + k_t

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      log_decay: as in `linear_attention`.
      state: {"memory": [B, H, K, V], "normalizer": [B, H, K]}.
      context: resets and the sequence axis.
      scale: factor of the queries, by default K**-0.5.

    Returns:
      (S_t^T q_t [B, T, H, V], n_t^T q_t [B, T, H], new state), all in the state's dtype.
    """
    (o, total), (memory, normalizer) = linear_attention(
        q,
        k,
        v.astype(state["memory"].dtype),
        log_decay,
        (state["memory"], state["normalizer"]),
        scale=scale,
        normalizer=True,
        reset=context.reset,
        sequence_axis=context.sequence_axis,
    )
    return o, total, {"memory": memory, "normalizer": normalizer}
