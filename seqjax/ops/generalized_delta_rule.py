"""The delta rule with any rank-one update: the state is read and written under different keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops import _checks, _chunked, _compat, _matrix_op, _sequence
from seqjax.ops._broadcast import along_rows
from seqjax.ops._time_scan import time_scan
from seqjax.types import Array, Float, Reset


def generalized_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear recurrence with a transition that is diagonal plus rank one.

        S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      S [K, V], g = log_decay
        o_t = scale * S_t^T q_t

    Where `reset` is true, S_{t-1} is cleared first. RWKV-7 (arXiv 2503.14456) is this recurrence;
    the delta rule is b = -beta k, a = exp(g) k and beta k for k; DeltaProduct (2502.10297) takes
    several such steps for one token. The state is bounded when diag(exp g) + b a^T does not expand
    it, which is the caller's business.

    Args:
      q, k, a, b: [B, T, H, K].
      v: [B, T, H, V].
      log_decay: None, [B, T, H] or [B, T, H, K], in [-inf, 0].
      initial_state: [B, H, K, V], zeros if None.
      scale: of the queries; K**-0.5 if None.
      reset: [B, T] bool.
      chunk_size: steps in a chunk, 64 if None; best a multiple of 16. The backward pass keeps at
        most one state per chunk.
      algorithm: "sequential" (step after step), "chunked" (matmuls inside chunks, chunk after
        chunk), "associative" (matmuls, and chunks in log depth, all at once) or None, which is
        chunked except for a handful of steps.
      implementation: "xla", "pallas" or None.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, final state [B, H, K, V] in float32, or float64 if any
      argument is).

    Raises:
      ValueError: for shapes or dtypes that do not fit, complex input among them.
      NotImplementedError: for an algorithm or implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> k = jnp.ones((1, 2, 1, 1))
      >>> v = jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
      >>> o, S = seqjax.generalized_delta_rule(k, k, v, a=k, b=-k)  # forget, then write
      >>> o.ravel().tolist()
      [3.0, 5.0]
    """
    return _matrix_op.call(
        "generalized_delta_rule",
        _run,
        {
            "q": q,
            "k": k,
            "v": v,
            "a": a,
            "b": b,
            "log_decay": log_decay,
            "initial_state": initial_state,
        },
        complex_ok=False,
        scale=scale,
        reset=reset,
        chunk_size=chunk_size,
        algorithm=algorithm,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


@functools.partial(jax.jit, static_argnames=("algorithm", "chunk_size", "sequence_axis"))
def _run(
    *operands: Any, algorithm: str, chunk_size: int, sequence_axis: str | None
) -> tuple[Array, Array]:
    *arrays, scale = operands
    q, k, v, a, b, log_decay, S0, reset = _compat.match_varying(*arrays)
    out, state = v.dtype, _checks.state_dtype(q, k, v, a, b, log_decay, S0)
    S0 = S0.astype(state)
    q = q.astype(state) * jnp.asarray(scale, state)
    if reset is not None:  # a cleared state is not read either
        a = jnp.where(reset[..., None, None], jnp.zeros_like(a), a)

    def step(S: Array, inputs: tuple) -> tuple[Array, Array]:
        *values, decay, cut = inputs
        q, k, v, a, b = (value.astype(state) for value in values)
        if cut is not None:
            S = jnp.where(cut[:, None, None, None], jnp.zeros_like(S), S)
        found = _chunked.read(S, a)
        if decay is not None:
            S = along_rows(decay, S.shape[-1]) * S
        S = S + _chunked.outer(b, found) + _chunked.outer(k, v)
        return S, _chunked.read(S, q).astype(out)

    def local(S0: Array, v: Array = v) -> tuple[Array, Array]:
        if algorithm == "sequential":
            decay = _chunked.decay_by_step(log_decay, q)
            return time_scan(step, S0, (q, k, v, a, b, decay, reset), chunk_size)
        arrays = {"q": q, "k": k, "v": v, "a": a, "b": b}
        return _chunked.scan_chunks(
            _prepare,
            arrays | {"g": _chunked.log_decay_of(log_decay, q)},
            S0,
            reset,
            out_dtype=out,
            chunk_size=chunk_size,
            log_depth=algorithm == "associative",
        )

    if sequence_axis is None:
        return local(S0)
    transition = _chunked.whole_transition(local, S0, v)
    return _sequence.run_split(local, transition, S0, reset, sequence_axis, apply=_chunked.matmul)


def _prepare(chunk: _chunked.Arrays) -> _chunked.ChunkMap:
    """A chunk, by what each step reads: z_t = S_{t-1}^T a_t.

    With G_t = exp(g_1 + ... + g_t), G_{t,j} = G_t / G_j and S the state that enters,

        S_t = G_t S + sum_{j <= t} G_{t,j} (b_j z_j^T + k_j v_j^T)
        z_t = S^T G_{t-1} a_t + sum_{j < t} (a_t^T G_{t-1,j} b_j) z_j + (a_t^T G_{t-1,j} k_j) v_j

    so (I - P) Z = P' V + (G_{t-1} a_t) S, P and P' strictly lower triangular, and with (I - P)^-1
    applied to both terms, Z = Z_c + W S. Reading S_t with q_t gives the outputs.
    """
    q, k, v, a, b, g = (chunk[name] for name in ("q", "k", "v", "a", "b", "g"))
    matmul = _chunked.matmul
    # a_t meets the state before step t: as the row of step t - 1, moved back afterwards.
    ahead = jnp.concatenate([a[..., 1:, :], jnp.zeros_like(a[..., :1, :])], axis=-2)
    products = _chunked.decayed_products((q, ahead), (b, k), g)
    (scores_b, scores_k), (ahead_b, ahead_k) = products
    decay, rest = _chunked.decay_through(g)
    last = jnp.broadcast_to(decay[..., -1, :], (*k.shape[:-2], k.shape[-1]))
    before = jnp.concatenate([jnp.ones_like(decay[..., :1, :]), decay[..., :-1, :]], axis=-2)
    inverse = _chunked.inverse_unit_lower(-_down(ahead_b))
    found = matmul(inverse, matmul(_down(ahead_k), v))
    w = matmul(inverse, a * before)
    left_b, left_k = (b * rest).mT, (k * rest).mT
    return _chunked.ChunkMap(
        outputs=matmul(scores_b, found) + matmul(scores_k, v),
        reads=q * decay + matmul(scores_b, w),
        offset=matmul(left_b, found) + matmul(left_k, v),
        transition=_chunked.diagonal(last) + matmul(left_b, w),
    )


def _down(rows: Array) -> Array:
    """Every row one step later, zeros first."""
    return jnp.concatenate([jnp.zeros_like(rows[..., :1, :]), rows[..., :-1, :]], axis=-2)
