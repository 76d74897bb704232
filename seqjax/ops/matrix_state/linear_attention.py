"""Linear attention with decay.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        S [K, V],   g = log_decay
    o_t = scale * S_t^T q_t

`_step` is this equation. In a chunk that starts from the state S, with G_t = exp(g_1 + ... + g_t)
and G_{t,j} = G_t / G_j,

    S_t = G_t S + sum_{j <= t} G_{t,j} k_j v_j^T
    o_t = S^T G_t q_t + sum_{j <= t} (q_t^T G_{t,j} k_j) v_j

which `_chunk` writes as matmuls. The recurrence is linear in the state, so its derivative is the
same recurrence backwards in time. With F_t the gradient of S_t,
F_{t-1} = diag(exp g_t) F_t + q_{t-1} do_{t-1}^T. JAX derives it from both forms.
"""

import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import chunked, decays
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.types import Array, Inexact, Reset


def linear_attention(
    q: Inexact[Array, "B T H K"],
    k: Inexact[Array, "B T H K"],
    v: Inexact[Array, "B T H V"],
    log_decay: Inexact[Array, "B T H"] | Inexact[Array, "B T H K"] | None = None,
    initial_state: Inexact[Array, "B H K V"] | None = None,
    *,
    scale: float | Array | None = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[Inexact[Array, "B T H V"], Inexact[Array, "B H K V"]]:
    """Compute linear attention with decay over time.

        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        S [K, V],   g = log_decay
        o_t = scale * S_t^T q_t

    Where `reset` is true, S_{t-1} is cleared first. Published forms differ in the decay:

    - none: Katharopoulos et al., arXiv 2006.16236 (without its normaliser);
    - one per head: RetNet (2307.08621) and Mamba-2 (2405.21060);
    - one per key channel: GLA (2312.06635), RWKV-6 and HGRN2;
    - complex, per key channel: GateLoop (2311.01927).

    The op does not conjugate `q`: pass the conjugate if the paper uses one.

    Args:
      q, k: [B, T, H, K], real or complex.
      v: [B, T, H, V].
      log_decay: None, [B, T, H] or [B, T, H, K]; real parts in [-inf, 0] for a stable state.
      initial_state: [B, H, K, V]; by default zeros.
      scale: factor of the queries, a real number or scalar array; by default K**-0.5. New values
        do not recompile.
      reset: [B, T] bool, True where the state is cleared before the step.
      chunk_size: steps in a chunk, rounded up to a power of two. By default 64, or 16 for the
        sequential algorithm. In the Pallas kernel 128, or the largest size that fits its memory.
        The backward pass stores at most one state per chunk.
      algorithm: "sequential" (step by step), "chunked" (matmuls inside chunks, chunk after chunk)
        or "associative" (matmuls, chunks in log depth). By default chunked, but sequential for a
        few steps, and on CPU for small states and without derivatives.
      implementation: "xla" or "pallas"; by default the backend is chosen automatically.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.
      interpret: run the Pallas kernel in interpret mode, without its hardware. This is slow.

    Returns:
      (o [B, T, H, V] in the dtype of `v`, final state [B, H, K, V] in float32, or float64 if any
      argument is); both complex if any argument is.

    Raises:
      ValueError: if shapes or dtypes do not fit.
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 3, 1, 1))
      >>> o, S = seqjax.linear_attention(one, one, one, jnp.log(one / 2))
      >>> [round(float(value), 4) for value in o.ravel()]
      [1.0, 1.5, 1.75]
    """
    return _LINEAR_ATTENTION(
        {"q": q, "k": k, "v": v},
        log_decay,
        initial_state,
        scale=scale,
        reset=reset,
        chunk_size=chunk_size,
        algorithm=algorithm,
        implementation=implementation,
        sequence_axis=sequence_axis,
        interpret=interpret,
    )


def _step(S: Array, decayed: Array, x: chunked.Arrays) -> Array:
    del S
    return decayed + linalg.outer(x["k"], x["v"])


def _chunk(x: chunked.Arrays) -> chunked.FactoredMap:
    q, k, v, g = (x[name] for name in ("q", "k", "v", "log_decay"))
    [[scores]] = decays.decayed_products((q,), (k,), g)
    from_start, to_end = decays.cumulative_decays(g, scores.dtype, repeat=k.dtype == jnp.bfloat16)
    return chunked.FactoredMap(
        outputs=linalg.product(scores, v),
        reads=decays.scaled(q, decays.widen(from_start, q.shape[-1])),
        decay=from_start[..., -1, :, None],
        write=decays.scaled(k, decays.widen(to_end, k.shape[-1])).mT,
        values=v,
    )


_LINEAR_ATTENTION = MatrixRecurrence(
    "linear_attention",
    _step,
    _chunk,
    complex_ok=True,
    has_kernels=True,
    mixed=True,
    diagonal=True,
    cpu_chunks_from=(1, 32 * 32, 32 * 32),
)
