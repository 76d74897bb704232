"""Delta rule: a matrix state that replaces the value stored under a key.

    S_t = (I - beta_t k_t k_t^T) D_t S_{t-1} + beta_t k_t v_t^T      D_t = diag(exp g_t), S [K, V]
    o_t = scale * S_t^T q_t                                          g = log_decay

**Step by step** (`_step`). The decayed state returns (D_t S_{t-1})^T k_t for the key k_t. The step
adds what is missing to v_t, times beta_t:

    S_t = D_t S_{t-1} + k_t u_t^T,      u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)

**In chunks** (`_chunk`). Let S be the state before the chunk, G_t = exp(g_1 + ... + g_t) and
G_{t,j} = G_t / G_j. Unrolled over the chunk,

    S_t = G_t S + sum_{j <= t} G_{t,j} k_j u_j^T
    u_t = beta_t (v_t - S^T G_t k_t - sum_{j < t} (k_t^T G_{t,j} k_j) u_j)

The second line is a triangular system for all u of the chunk. With N the strictly lower part of
beta_t k_t^T G_{t,j} k_j, and U, V, K the matrices with rows u_t, v_t, k_t,

    (I + N) U = beta V - beta (G K) S      so      U = U_c - W S

with U_c = (I + N)^-1 beta V and W = (I + N)^-1 beta (G K), which do not depend on S. The first
line, read with q_t and taken at the last step C, then gives the chunk as an affine map of S:

    O  = A U_c + (G Q - A W) S                          A[t, j] = q_t^T G_{t,j} k_j for j <= t
    S' = B^T U_c + (diag(G_C) - B^T W) S                B[j] = G_{C,j} k_j

**Derivatives.** With F_t the gradient of S_t, which contains scale q_t do_t^T, and e_t = u_t /
beta_t the error, the step's transpose is

    du_t    = F_t^T k_t                        dv_t = beta_t du_t,      dbeta_t = e_t . du_t
    dk_t    = F_t u_t - beta_t D_t S_{t-1} du_t
    F_{t-1} = D_t (F_t - beta_t k_t du_t^T) + scale q_{t-1} do_{t-1}^T

JAX derives this from `_step` and from `_chunk`, whose states are recomputed per chunk. The Pallas
kernels have backward kernels.
"""

from typing import Any

import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.core.linalg import along_rows, down_columns
from seqjax.ops.matrix_state import chunked, decays
from seqjax.ops.matrix_state.factored_chunks import FactoredMap
from seqjax.ops.matrix_state.input_maps import SoftplusGate
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.types import Array, Float, Reset


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    *,
    scale: float | Array | None = None,
    state_dtype: Any = None,
    normalize: bool = False,
    gate: SoftplusGate | None = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute the (gated) delta rule over time.

        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T      g = log_decay
        o_t = scale * S_t^T q_t                                                    S [K, V]

    S is decayed, and then the value that it returns for k_t moves by beta_t towards v_t. Where
    `reset` is true, S_{t-1} is cleared first. The state is stable for beta |k|^2 in [0, 2]. By
    default the op does not normalize the keys. The Pallas kernel for TPU computes `normalize` and
    `gate` itself, which saves passes over memory.

    DeltaNet (arXiv 2406.06484) is this op without decays, Gated DeltaNet (2412.06464) with one
    decay per head, and Kimi Delta Attention (2510.26692) with one per key channel. Beta up to 2
    gives negative eigenvalues (2411.12537).

    Args:
      q, k: [B, T, G, K]. G divides H, and head h uses q and k of head h // (H / G).
      v: [B, T, H, V].
      beta: [B, T, H], the write strength.
      log_decay: None, [B, T, H] or [B, T, H, K], in [-inf, 0]; with `gate` any real numbers x.
      initial_state: [B, H, K, V]; by default zeros.
      scale: factor of the queries, a real number or scalar array; by default K**-0.5. New values
        do not recompile.
      state_dtype: bfloat16 for a final state of half the size; by default float32 or float64. All
        sums inside a call stay in float32, and the carried state is rounded once per call. Token by
        token, the outputs of 4,096 tokens then had a relative error (root mean square) of 0.3 % for
        decays of 0.9, 1.0 % for 0.99, and 1.6 % without decay.
      normalize: whether to replace q and k by x / sqrt(|x|^2 + 1e-6), computed in float32 (float64
        for float64) and rounded to their dtype.
      gate: None, or a `seqjax.ops.SoftplusGate` of arrays A_log and dt_bias. The logarithms of the
        decays are then g = -exp(A_log) softplus(x + dt_bias).
      reset: [B, T] bool, True where the state is cleared before the step.
      chunk_size: steps in a chunk, rounded up to a power of two. By default 64, or 16 for the
        sequential algorithm. The Pallas kernel for TPU uses 128 by default, or the largest size
        that fits its memory. The kernel for GPU supports only 64. The backward pass stores at most
        one state per chunk.
      block_sizes: (steps, heads) of a block of the kernel for TPU: steps a power of two from 16 on,
        which replaces `chunk_size` there; heads a multiple of 8 or H. By default the steps of
        `chunk_size` and 8 heads. If V exceeds 256, each slice of 256 values counts as a head. The
        sizes have no effect where XLA runs the call by default, as on CPU. The compiler raises if a
        block exceeds its memory.
      algorithm: "sequential" (step by step), "chunked" (matmuls inside chunks, chunk after chunk)
        or "associative" (matmuls, chunks in log depth). By default chunked, but sequential for a
        few steps, and on CPU for small states and without derivatives.
      implementation: "xla" or "pallas"; by default the backend is chosen automatically. The
        kernel for GPU runs only by name, in float32 and bfloat16. It requires K of 64 or 128, and
        V a multiple of 64.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.
      interpret: run the Pallas kernel in interpret mode, without its hardware. This is slow.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, final state [B, H, K, V] in float32, or float64 if any
      argument is).

    Raises:
      ValueError: if shapes, dtypes or block sizes do not fit, an input is complex, or
        `block_sizes` are combined with implementation="xla".
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform, or `block_sizes` are given and the kernel does not support the call.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> k = jnp.ones((1, 2, 1, 1))
      >>> v = jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
      >>> o, S = seqjax.delta_rule(k, k, v, beta=jnp.ones((1, 2, 1)))  # the new value replaces
      >>> o.ravel().tolist()
      [3.0, 5.0]
    """
    return _DELTA_RULE(
        {"q": q, "k": k, "v": v, "beta": beta},
        log_decay,
        initial_state,
        scale=scale,
        state_dtype=state_dtype,
        normalize=normalize,
        gate=gate,
        reset=reset,
        chunk_size=chunk_size,
        block_sizes=block_sizes,
        algorithm=algorithm,
        implementation=implementation,
        sequence_axis=sequence_axis,
        interpret=interpret,
    )


def _step(S: Array, decayed: Array, x: chunked.Arrays) -> Array:
    key = x["decay"] * x["k"] if "decay" in x else x["k"]
    error = x["v"] - linalg.read(S, key)
    return decayed + linalg.outer(x["k"], x["beta"] * error)


def _chunk(x: chunked.Arrays) -> FactoredMap:
    q, k, v, beta, g = x["q"], x["k"], x["v"], x["beta"][..., 0], x["log_decay"]
    narrow = k.dtype == jnp.bfloat16  # only on accelerators
    [[scores], [overlaps]] = decays.decayed_products((q, k), (k,), g)
    from_start, to_end = decays.cumulative_decays(g, beta.dtype, repeat=narrow)
    upto = decays.widen(from_start, k.shape[-1])
    lower = along_rows(beta, k.shape[-2]) * jnp.tril(overlaps, -1)
    scores, lower = linalg.stored_once((scores, lower), narrow)
    inverse = linalg.inverse_unit_lower(lower, narrow)

    # The sums over a chunk cancel if keys repeat, so their terms are not rounded to bfloat16.
    solved = inverse * down_columns(beta, k.shape[-2])
    by_step = linalg.matmul(scores, linalg.stored_once(solved, narrow))
    wide = linalg.spread(k, to_end).astype(to_end.dtype)
    if to_end.shape[-1] == 1:
        rows = along_rows(to_end[..., 0], k.shape[-2])
        at_end = linalg.matmul_tn(rows * solved, wide, narrow)
    else:
        at_end = linalg.matmul_tn(solved, wide * to_end, narrow)
    return FactoredMap(
        scores=by_step,
        reads=decays.scaled(q, upto),
        decay=decays.of_chunk(g, from_start, repeat=narrow)[..., 0, :, None],
        write=at_end.astype(k.dtype),
        values=v,
        erase=decays.scaled(-k, upto),
    )


_DELTA_RULE = MatrixRecurrence(
    "delta_rule",
    _step,
    _chunk,
    {"k": "B T G K", "beta": "B T H"},
    has_kernels=True,
    mixed=True,
)
