"""Matrix memories in which every step writes its own and the previous keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers._reductions import at_substep
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.previous import previous

# Products of numbers in the state dtype. The default precision would round them.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def two_point(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    state: dict[str, jax.Array],
    context: Context,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run linear attention in which every step writes the current and the previous keys and values.

        S_t = a_t S_{t-1} + sum_r a_t b_t k_{t-1}^r (v_{t-1}^r)^T + c_t k_t^r (v_t^r)^T
        o_t^r = S_t^T q_t^r                                                a_t = exp g_t

    With R_t = S_{t-1} + b_t sum_r k_{t-1}^r (v_{t-1}^r)^T this is linear attention of one step
    earlier:

        R_{t+1} = a_t R_t + (c_t + b_{t+1}) sum_r k_t^r (v_t^r)^T
        o_t^r = a_t R_t^T q_t^r + c_t sum_s ((k_t^s)^T q_t^r) v_t^s

    For a rank above 1, `linear_attention` runs on `rank` sub-steps for each token, with one write
    and one read each. Every read of a token must include all writes of the token, but the op reads
    only those up to the same sub-step. A sum over the pairs of a token adds the later writes. There
    is no decay between the sub-steps of a token, so the outputs are exact.

    Args:
      q, k: [B, T, rank, H, K].
      v: [B, T, rank, H, V].
      log_decay: g [B, T, H], in the state dtype.
      weights: (b, c), both [B, T, H], in the state dtype.
      state: {"memory": S [B, H, K, V], "k": [B, rank, H, K], "v": [B, rank, H, V]} before the first
        step; zeros at the start.
      context: supplies `reset` and `sequence_axis`.

    Returns:
      (o [B, T, rank, H, V] in the dtype of `v`, the state after the last step).
    """
    b, c = weights
    rank, wide = k.shape[2], log_decay.dtype
    now = {"k": k, "v": v, "c": c, "log_decay": log_decay}
    nothing = jnp.zeros_like(c[:, 0])  # the state holds S, which has the writes of its last step
    before = {name: state[name].astype(now[name].dtype) for name in ("k", "v")}
    before |= {"c": nothing, "log_decay": nothing}
    late, last = previous(now, before, context.reset, context.sequence_axis)
    weight = (late["c"] + b)[:, :, None, :, None]
    reset = None if context.reset is None else at_substep(context.reset, rank, 0)
    reads = q * jnp.exp(log_decay)[:, :, None, :, None].astype(q.dtype)
    writes = late["k"] * weight.astype(k.dtype)
    o, memory = linear_attention(
        _as_steps(reads),
        _as_steps(writes),
        _as_steps(late["v"]),
        at_substep(late["log_decay"], rank, 0),
        state["memory"],
        scale=1.0,
        reset=reset,
        sequence_axis=context.sequence_axis,
    )
    o = o.reshape(v.shape).astype(wide)
    o = o + _read(q, k, v, c[:, :, None, None], wide)
    if rank > 1:  # the writes of later sub-steps
        later = jnp.triu(jnp.ones((rank, rank), wide), 1)[..., None]
        o = o + _read(reads, writes, late["v"], later, wide)
    o = o.astype(v.dtype)
    k, v = (last[name].astype(memory.dtype) for name in ("k", "v"))
    written = _einsum("brhk,brhv->bhkv", k * last["c"][:, None, :, None], v)
    memory = jnp.exp(last["log_decay"])[..., None, None] * memory + written
    return o, {"memory": memory, "k": k, "v": v}


def _as_steps(x: jax.Array) -> jax.Array:
    """Lay x [B, T, R, ...] out in time."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _read(
    q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, wide: jnp.dtype
) -> jax.Array:
    """Return sum_s (q^r . k^s) w^rs v^s within each step; w broadcasts to [B, T, R, R, H]."""
    q, k, v = (x.astype(wide) for x in (q, k, v))
    scores = _einsum("btrhk,btshk->btrsh", q, k) * weights
    return _einsum("btrsh,btshv->btrhv", scores, v)
