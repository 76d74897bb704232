"""Reads of the state before a step: o_t = scale * S_{t-1}^T q_t in place of S_t^T q_t.

A recurrence that reads S_t with the query of the next step computes these outputs one step early.
So the queries move one step back and the outputs one step forward. The first output reads the
initial state. Every algorithm and kernel supports this form, and the states do not change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import grouped_heads

Compute = Callable[..., tuple[jax.Array, jax.Array]]


def exclusive(compute: Compute, default_scale: float | None, bonus: jax.Array | None) -> Compute:
    """Return `compute` with outputs that read the state before the decay and the write of a step.

        o_t = scale * (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t          S_{t-1} = 0 at a reset

    Args:
      compute: maps (arrays, log_decay, S0, reset, scale) to (outputs [B, T, H, V], final state).
      default_scale: the scale where the operand `scale` is None.
      bonus: [H, K], [H], or None for 0.
    """

    def run(
        arrays: Any, log_decay: Any, S0: jax.Array, reset: Any, scale: Any
    ) -> tuple[jax.Array, jax.Array]:
        q = arrays["q"]
        later = jnp.concatenate([q[:, 1:], jnp.zeros_like(q[:, :1])], axis=1)
        if reset is not None:  # the query of a new segment must not read the state before it
            later = _cleared(later, jnp.concatenate([reset[:, 1:], reset[:, :1]], axis=1))
        out, final = compute(arrays | {"q": later}, log_decay, S0, reset, scale)
        factor = jnp.asarray(default_scale if scale is None else scale, S0.dtype)
        before = S0 if reset is None else _cleared(S0, reset[:, 0])
        query = grouped_heads.repeat(q[:, :1], S0.shape[1])[:, 0].astype(S0.dtype)
        first = linalg.read(before, factor * query).astype(out.dtype)
        out = jnp.concatenate([first[:, None], out[:, :-1]], axis=1)
        if reset is not None:
            # A cleared state times the query: zero, or NaN if the query is not finite.
            marks = jax.lax.stop_gradient(jnp.sum(q * 0, axis=-1, keepdims=True))
            marks = grouped_heads.repeat(marks, S0.shape[1]).astype(out.dtype)
            out = jnp.where(reset[:, :, None, None], marks, out)
        if bonus is not None:
            wide = S0.dtype
            own = factor * _own_scores(q.astype(wide), arrays["k"].astype(wide), bonus)
            added = out.astype(wide) + own[..., None] * arrays["v"].astype(wide)
            out = added.astype(out.dtype)
        return out, final

    return run


def _cleared(x: jax.Array, reset: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(reset, range(reset.ndim, x.ndim)), jnp.zeros_like(x), x)


def _own_scores(q: jax.Array, k: jax.Array, bonus: jax.Array) -> jax.Array:
    """Return the sum over K of q bonus k: [B, T, G or H, K] and [H, K] or [H] to [B, T, H]."""
    groups, size = max(q.shape[2], k.shape[2]), q.shape[-1]
    q, k = (grouped_heads.repeat(x, groups) for x in (q, k))
    weights = bonus.astype(q.dtype).reshape(groups, bonus.shape[0] // groups, -1)
    weights = jnp.broadcast_to(weights, (*weights.shape[:2], size))
    own = jnp.einsum("btgk,gnk->btgn", q * k, weights, precision=jax.lax.Precision.HIGHEST)
    return own.reshape(*own.shape[:2], bonus.shape[0])
