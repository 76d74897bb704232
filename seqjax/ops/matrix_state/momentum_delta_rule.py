"""Delta rule with momentum: corrections accumulate in a second matrix, which moves the state.

    P_t = exp(h_t) P_{t-1} + beta_t k_t (v_t - M_{t-1}^T k_t)^T        h = log_momentum
    M_t = exp(g_t) M_{t-1} + P_t                                       g = log_decay
    o_t = scale * M_t^T q_t                                            M, P [K, V]

The state of the recurrence is [M; P], of 2K rows. In a chunk that starts from M and P, with
D_{t,j} = exp(g_{j+1} + ... + g_t), E_{t,j} alike for h, and u_t = beta_t (v_t - M_{t-1}^T k_t),

    M_t = D_{t,0} M + X_t P + sum_{j <= t} W_{t,j} k_j u_j^T
    P_t = E_{t,0} P + sum_{j <= t} E_{t,j} k_j u_j^T
    W_{t,j} = sum_{i = j..t} D_{t,i} E_{i,j},    X_t = sum_{i = 1..t} D_{t,i} E_{i,0}

W is a product of two triangular matrices of decays, so no factor exceeds one and nothing is
divided. M_{t-1} read with k_t gives a triangular system for all u of the chunk, as in the delta
rule. The last chunk is padded with steps that must not change the state, although a step without a
correction adds P to M. Padded steps therefore have a `pace` of zero, the factor of P in M_t.
"""

from typing import Any

import jax.numpy as jnp

from seqjax.ops.core import checks, explicit_mesh, linalg
from seqjax.ops.matrix_state import block_decays, chunked, decays
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.types import Array, Float, Reset

PATTERNS = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "beta": "B T H",
    "log_decay": "B T H",
    "log_momentum": "B T H",
    "initial_state": "B H P K V",
}


@explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T H V", "B H P K V"))
def momentum_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None,
    log_momentum: Float[Array, "B T H"],
    initial_state: Float[Array, "B H 2 K V"] | None = None,
    *,
    scale: float | Array | None = None,
    state_dtype: Any = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H 2 K V"]]:
    """Compute the delta rule with momentum and forgetting over time.

        P_t = exp(h_t) P_{t-1} + beta_t k_t (v_t - M_{t-1}^T k_t)^T        h = log_momentum
        M_t = exp(g_t) M_{t-1} + P_t                                       g = log_decay
        o_t = scale * M_t^T q_t                                            M, P [K, V]

    This is the memory of Titans (arXiv 2501.00663) with a linear model and the squared error,
    updated at every step. M_{t-1} is read before its decay. Where `reset` is true, M and P are
    cleared first. The op does not normalize the keys and does not check that the state stays
    bounded: large beta |k|^2 with momentum near 1 lets it grow.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      beta: [B, T, H], the step size.
      log_decay: g [B, T, H], in [-inf, 0]; None for 0.
      log_momentum: h [B, T, H], in [-inf, 0]; -inf for no momentum.
      initial_state: [B, H, 2, K, V], M and P; by default zeros.
      scale: factor of the queries, a real number or scalar array; by default K**-0.5. New values
        do not recompile.
      state_dtype: bfloat16 for a final state of half the size; by default float32 or float64. All
        sums inside a call stay in float32, and the carried state is rounded once per call.
      reset: [B, T] bool, True where the state is cleared before the step.
      chunk_size: steps in a chunk, rounded up to a power of two. By default 64, or 16 for the
        sequential algorithm. The backward pass stores at most one state per chunk.
      algorithm: "sequential" (step by step), "chunked" (matmuls inside chunks, chunk after chunk)
        or "associative" (matmuls, chunks in log depth). By default chunked, but sequential for a
        few steps, and for small states on CPU.
      implementation: "xla" or None.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, final state [B, H, 2, K, V] in float32, or float64 if any
      argument is).

    Raises:
      ValueError: if shapes or dtypes do not fit, or an input is complex.
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 3, 1, 1))
      >>> beta, half = 0.5 * one[..., 0], jnp.log(0.5 * one[..., 0])
      >>> o, state = seqjax.momentum_delta_rule(one, one, one, beta, None, half)
      >>> o.ravel().tolist(), state.shape
      ([0.5, 1.0, 1.25], (1, 1, 2, 1, 1))
    """
    op = "momentum_delta_rule"
    given = checks.as_arrays(
        {
            "q": q,
            "k": k,
            "v": v,
            "beta": beta,
            "log_decay": log_decay,
            "log_momentum": log_momentum,
            "initial_state": initial_state,
        }
    )
    sizes = checks.check_shapes(op, PATTERNS, given)
    checks.check_dtypes(op, given, complex_ok=False)
    if sizes.get("P", 2) != 2:
        shape = list(given["initial_state"].shape)
        raise ValueError(
            f"{op}: `initial_state` must have shape [B, H, 2, K, V], the memory and the momentum,"
            f" got {shape}."
        )
    q, k, decay, state = (given[name] for name in ("q", "k", "log_decay", "initial_state"))
    pace = jnp.ones_like(given["beta"])
    wide = (sizes["B"], sizes["H"], 2 * sizes["K"], sizes["V"])
    inputs = {
        "q": jnp.concatenate([q, jnp.zeros_like(q)], axis=-1),  # reads M and not P
        "k": k,
        "read": k,
        "v": given["v"],
        "beta": given["beta"],
        "memory_log_decay": jnp.zeros_like(pace) if decay is None else decay,
        "momentum_log_decay": given["log_momentum"],
        "pace": pace,
    }
    out, final = _MOMENTUM_DELTA_RULE(
        inputs,
        None,
        None if state is None else state.reshape(wide),
        scale=sizes["K"] ** -0.5 if scale is None else scale,
        state_dtype=state_dtype,
        reset=reset,
        chunk_size=chunk_size,
        algorithm=algorithm,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )
    return out, final.reshape(*wide[:2], 2, *given["k"].shape[-1:], wide[-1])


def _step(S: Array, decayed: Array, x: chunked.Arrays) -> Array:
    del decayed  # the decays of M and P differ
    size = S.shape[-2] // 2
    memory, momentum = S[..., :size, :], S[..., size:, :]
    forget, slow = (
        block_decays.decay_of(x[f"{name}_log_decay"])[..., None] for name in ("memory", "momentum")
    )
    error = x["v"] - linalg.read(memory, x["read"])
    momentum = slow * momentum + linalg.outer(x["k"], x["beta"] * error)
    memory = forget * memory + x["pace"][..., None] * momentum
    # On CPU, XLA concatenates element by element: the same step then takes five times as long.
    return S.at[..., :size, :].set(memory).at[..., size:, :].set(momentum)


def _chunk(x: chunked.Arrays) -> chunked.ChunkMap:
    product, matmul = linalg.product, linalg.matmul
    k, r, v, beta = x["k"], x["read"], x["v"], x["beta"][..., 0]
    size = k.shape[-1]
    q, pace = x["q"][..., :size], linalg.down_columns(x["pace"][..., 0], k.shape[-2])
    # "log_decay" is true at resets, which clear both matrices.
    g, h = (
        jnp.where(x["log_decay"], -jnp.inf, x[f"{name}_log_decay"])
        for name in ("memory", "momentum")
    )
    forget, slow = block_decays.between(g[..., 0]), block_decays.between(h[..., 0])
    from_start = decays.cumulative_decays(g, g.dtype)[0]  # D_{t,0} [..., C, 1]
    momentum = decays.cumulative_decays(h, h.dtype)[0]  # E_{t,0}
    weights = matmul(forget * pace, slow)  # W
    added = matmul(forget * pace, momentum)  # X

    def both(memory: Array, momentum: Array, rows: Array) -> Array:
        """Return rows that read M and P with a weight each: [..., C, 2K]."""
        return jnp.concatenate([memory * rows, momentum * rows], axis=-1)

    def earlier(rows: Array, first: Array) -> Array:
        """Move every row down by one."""
        return jnp.concatenate([first, rows[..., :-1, :]], axis=-2)

    one, zero = jnp.ones_like(from_start[..., :1, :]), jnp.zeros_like(added[..., :1, :])
    before = both(earlier(from_start, one), earlier(added, zero), r)
    weights_before = earlier(weights, jnp.zeros_like(weights[..., :1, :]))
    overlaps = weights_before * product(r, k, decays.NT)
    inverse = linalg.inverse_unit_lower(linalg.along_rows(beta, k.shape[-2]) * overlaps)
    solved = matmul(weights * product(q, k, decays.NT), inverse)
    by_step = solved * linalg.down_columns(beta, k.shape[-2])
    last, slow_last = weights[..., -1:, :].mT, slow[..., -1:, :].mT
    at_end = matmul(both(last, slow_last, k).mT, inverse) * linalg.down_columns(beta, 2 * size)
    identity = jnp.eye(size, dtype=k.dtype)
    decay, cross, keep = (y[..., -1:, :] * identity for y in (from_start, added, momentum))
    top = jnp.concatenate([decay, cross], axis=-1)
    bottom = jnp.concatenate([jnp.zeros_like(keep), keep], axis=-1)
    return chunked.ChunkMap(
        outputs=product(by_step, v),
        reads=both(from_start, added, q) - product(by_step, before),
        offset=product(at_end, v),
        transition=jnp.concatenate([top, bottom], axis=-2) - product(at_end, before),
    )


_MOMENTUM_DELTA_RULE = MatrixRecurrence(
    "momentum_delta_rule",
    _step,
    _chunk,
    {
        "k": "B T H J",
        "read": "B T H J",
        "beta": "B T H",
        "memory_log_decay": "B T H",
        "momentum_log_decay": "B T H",
        "pace": "B T H",
    },
    reads_before_decay=("read",),
)
