"""Reads of matrix memories that see the last write late, or weighted differently."""

import jax
import jax.numpy as jnp

from seqjax.layers._base import state_dtype
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.previous import previous


def read_before_write(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    memory: jax.Array,
    bonus: jax.Array | None,
    context: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run linear attention whose outputs read the memory before the step's decay and write.

        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t            S_t = diag(exp g_t) S_{t-1} + k_t v_t^T

    `linear_attention` on keys, values and decays of one step earlier has S_{t-1} as its state.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      log_decay: g, [B, T, H] or [B, T, H, K], in the state dtype.
      memory: S before the first step, [B, H, K, V].
      bonus: u [H, K]; None for 0.
      context: supplies `reset` and `sequence_axis`.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, S after the last step).
    """
    now = {"k": k, "v": v, "log_decay": log_decay}
    late, last = previous(now, None, context.reset, context.sequence_axis)
    o, memory = _attention(q, late, memory, context)
    if bonus is not None:
        o = _add_own(o, q, k * bonus.astype(k.dtype), v)
    return o, _write(memory, last["k"], last["v"], last["log_decay"])


def two_point(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    state: dict[str, jax.Array],
    context: Context,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run linear attention in which every step writes the current and the previous key and value.

        S_t = a_t S_{t-1} + a_t b_t k_{t-1} v_{t-1}^T + c_t k_t v_t^T          a_t = exp g_t
        o_t = S_t^T q_t

    With R_t = S_{t-1} + b_t k_{t-1} v_{t-1}^T this is linear attention of one step earlier,

        R_{t+1} = a_t R_t + (c_t + b_{t+1}) k_t v_t^T
        o_t = a_t R_t^T q_t + c_t (k_t^T q_t) v_t

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      log_decay: g [B, T, H], in the state dtype.
      weights: (b, c), both [B, T, H], in the state dtype.
      state: {"memory": S [B, H, K, V], "k": [B, H, K], "v": [B, H, V]} before the first step; zeros
        at the start.
      context: supplies `reset` and `sequence_axis`.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, the state after the last step).
    """
    b, c = weights
    now = {"k": k, "v": v, "c": c, "log_decay": log_decay}
    nothing = jnp.zeros_like(c[:, 0])  # the state holds S, which has the writes of its last step
    before = {"k": state["k"], "v": state["v"], "c": nothing, "log_decay": nothing}
    late, last = previous(now, before, context.reset, context.sequence_axis)
    late["k"] = late["k"] * (late["c"] + b)[..., None].astype(k.dtype)
    decay = jnp.exp(log_decay)[..., None].astype(q.dtype)
    o, memory = _attention(q * decay, late, state["memory"], context)
    o = _add_own(o, q, k * c[..., None].astype(k.dtype), v)
    written = last["k"] * last["c"][..., None]
    memory = _write(memory, written, last["v"], last["log_decay"])
    return o, {"memory": memory, "k": last["k"], "v": last["v"]}


def _attention(
    q: jax.Array, late: dict[str, jax.Array], memory: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array]:
    return linear_attention(
        q,
        late["k"],
        late["v"],
        late["log_decay"],
        memory,
        scale=1.0,
        reset=context.reset,
        sequence_axis=context.sequence_axis,
    )


def _add_own(o: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Add (k_t^T q_t) v_t to the outputs, in the state dtype."""
    wide_o, q, k, v = (x.astype(state_dtype(x.dtype)) for x in (o, q, k, v))
    return (wide_o + jnp.sum(q * k, axis=-1, keepdims=True) * v).astype(o.dtype)


def _write(memory: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Return diag(exp g) S + k v^T for one step, with a decay [B, H] or [B, H, K]."""
    k, v, log_decay = (x.astype(memory.dtype) for x in (k, v, log_decay))
    decay = jnp.exp(log_decay)
    return (
        decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim)) * memory
        + k[..., None] * v[..., None, :]
    )
