"""The delta rule: a matrix state that replaces what it holds under a key."""

import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import chunked, decays, recurrence
from seqjax.types import Array, Float, Reset


@recurrence.auto_inside
def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    *,
    scale: float | Array | None = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The (gated) delta rule.

        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T      g = log_decay
        o_t = scale * S_t^T q_t                                                    S [K, V]

    that is, S is decayed, and then what it holds under k_t moves by beta_t towards v_t. Where
    `reset` is true, S_{t-1} is cleared first. DeltaNet: arXiv 2406.06484; one decay per head:
    Gated DeltaNet, 2412.06464; per key channel: Kimi Delta Attention, 2510.26692; beta up to 2
    gives negative eigenvalues, 2411.12537. The state is stable for beta |k|^2 in [0, 2]; keys are
    taken as they come, so normalise them in the layer.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      beta: [B, T, H], the write strength.
      log_decay: None, [B, T, H] or [B, T, H, K], in [-inf, 0].
      initial_state: [B, H, K, V], zeros if None.
      scale: factor of the queries, a real number or scalar array; K**-0.5 if None. New values do
        not recompile.
      reset: [B, T] bool.
      chunk_size: steps in a chunk, rounded up to a power of two; 64 if None, 16 step after step,
        128 in the Pallas kernel, or what fits its memory.
        The backward pass keeps at most one state per chunk.
      algorithm: "sequential" (step after step), "chunked" (matmuls inside chunks, chunk after
        chunk), "associative" (matmuls, and chunks in log depth, all at once) or None, which is
        chunked except for a handful of steps, and for small states on CPU.
      implementation: "xla", "pallas" or None.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.
      interpret: run the Pallas kernel without its hardware, slowly; for tests.

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
      >>> o, S = seqjax.delta_rule(k, k, v, beta=jnp.ones((1, 2, 1)))  # the new value replaces
      >>> o.ravel().tolist()
      [3.0, 5.0]
    """
    return recurrence.call(
        _RECURRENCE,
        {
            "q": q,
            "k": k,
            "v": v,
            "beta": beta,
            "log_decay": log_decay,
            "initial_state": initial_state,
        },
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
    error = x["v"] - linalg.read(decayed, x["k"])
    return decayed + linalg.outer(x["k"], x["beta"] * error)


def _prepare(chunk: chunked.Arrays) -> chunked.ChunkMap:
    """A chunk of the delta rule, by what each step writes: S_t = D_t S_{t-1} + k_t u_t^T.

    With G_t = exp(g_1 + ... + g_t), G_{t,j} = G_t / G_j and S the state that enters,

        S_t = G_t S + sum_{j <= t} G_{t,j} k_j u_j^T
        u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)
            = beta_t (v_t - S^T G_t k_t - sum_{j < t} (k_t^T G_{t,j} k_j) u_j)

    so (I + N) U = beta V - beta (G K) S, N the strictly lower part of beta_t k_t^T G_{t,j} k_j, and
    with (I + N)^-1 applied to both terms, U = U_c - W S. Reading S_t with q_t gives the outputs.
    """
    q, k, v, beta, g = (chunk[name] for name in ("q", "k", "v", "beta", "g"))
    matmul = linalg.matmul
    [[scores], [overlaps]] = decays.decayed_products((q, k), (k,), g)
    inverse = linalg.inverse_unit_lower(decays.widen(beta, k.shape[-2]) * jnp.tril(overlaps, -1))
    decay, rest = (decays.widen(x, k.shape[-1]) for x in decays.decay_through(g, k.dtype))
    beta_v, beta_k = (decays.widen(beta, x.shape[-1]) * x for x in (v, k * decay))
    written, w = matmul(inverse, beta_v), matmul(inverse, beta_k)
    left = (k * rest).mT
    return chunked.ChunkMap(
        outputs=matmul(scores, written),
        reads=q * decay - matmul(scores, w),
        offset=matmul(left, written),
        transition=linalg.diagonal(decay[..., -1, :]) - matmul(left, w),
    )


_RECURRENCE = recurrence.Recurrence("delta_rule", _step, _prepare, cpu_chunks_from=(48 * 48,) * 3)
