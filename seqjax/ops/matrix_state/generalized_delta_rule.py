"""Generalized delta rule: the state is read under one key and written under another.

    S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      D_t = diag(exp g_t), S [K, V]
    o_t = scale * S_t^T q_t                                  g = log_decay

`_step` is this equation, with z_t = S_{t-1}^T a_t, the value read under a_t. In a chunk that starts
from the state S, with G_t = exp(g_1 + ... + g_t) and G_{t,j} = G_t / G_j,

    S_t = G_t S + sum_{j <= t} G_{t,j} (b_j z_j^T + k_j v_j^T)
    z_t = S^T G_{t-1} a_t + sum_{j < t} (a_t^T G_{t-1,j} b_j) z_j + (a_t^T G_{t-1,j} k_j) v_j

The second line is a triangular system for all z of the chunk. With P and P' the strictly lower
triangular matrices of its two sums,

    (I - P) Z = P' V + (G_{t-1} a_t) S      so      Z = Z_c + W S

and reading S_t with q_t gives the outputs (`_chunk`). JAX derives the derivatives from both
forms. The Pallas kernel has a backward kernel.
"""

from typing import Any

import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import chunked, decays
from seqjax.ops.matrix_state.factored_chunks import WRITE, FactoredMap
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.types import Array, Float, Reset


def generalized_delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T G K"] | Float[Array, "B T H K"],
    b: Float[Array, "B T G K"] | Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    *,
    scale: float | Array | None = None,
    state_dtype: Any = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute a linear recurrence with a transition that is diagonal plus rank one.

        S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      S [K, V], g = log_decay
        o_t = scale * S_t^T q_t

    Where `reset` is true, S_{t-1} is cleared first. RWKV-7 (arXiv 2503.14456) is this recurrence.
    The delta rule is this recurrence with b = -beta k, a = exp(g) k, and beta k for k. DeltaProduct
    (2502.10297) takes several such steps per token. The state is bounded if diag(exp g) + b a^T
    does not expand it; the op does not check this.

    Args:
      q, k: [B, T, G, K]. G divides H, and head h uses q and k of head h // (H / G).
      v: [B, T, H, V].
      a, b: [B, T, G, K] or [B, T, H, K].
      log_decay: None, [B, T, H] or [B, T, H, K], in [-inf, 0].
      initial_state: [B, H, K, V]; by default zeros.
      scale: factor of the queries, a real number or scalar array; by default K**-0.5. New values
        do not recompile.
      state_dtype: bfloat16 for a final state of half the size; by default float32 or float64. All
        sums inside a call stay in float32, and the carried state is rounded once per call.
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
      implementation: "xla" or "pallas"; by default the backend is chosen automatically.
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
      >>> o, S = seqjax.generalized_delta_rule(k, k, v, a=k, b=-k)  # forget, then write
      >>> o.ravel().tolist()
      [3.0, 5.0]
    """
    return _GENERALIZED_DELTA_RULE(
        {"q": q, "k": k, "v": v, "a": a, "b": b},
        log_decay,
        initial_state,
        scale=scale,
        state_dtype=state_dtype,
        reset=reset,
        chunk_size=chunk_size,
        block_sizes=block_sizes,
        algorithm=algorithm,
        implementation=implementation,
        sequence_axis=sequence_axis,
        interpret=interpret,
    )


def _step(S: Array, decayed: Array, x: chunked.Arrays) -> Array:
    z = linalg.read(S, x["a"])
    return decayed + linalg.outer(x["b"], z) + linalg.outer(x["k"], x["v"])


def _chunk(x: chunked.Arrays) -> FactoredMap:
    v, g, product = x["v"], x["log_decay"], linalg.product
    narrow = v.dtype == jnp.bfloat16  # only on accelerators
    # These may be shared by heads, or not. A reset alone is shared by all.
    q, k, a, b = (linalg.spread(x[name], v) for name in "qkab")
    # a_t reads the state before step t: put it in row t - 1, and move the products back.
    next_a = jnp.concatenate([a[..., 1:, :], jnp.zeros_like(a[..., :1, :])], axis=-2)
    products = decays.decayed_products((q, next_a), (b, k), g)
    (scores_b, scores_k), (reads_b, reads_k) = products
    from_start, to_end = decays.cumulative_decays(g, scores_b.dtype, k.shape[-1], repeat=narrow)
    first = jnp.ones_like(from_start[..., :1, :])
    before_step = jnp.concatenate([first, from_start[..., :-1, :]], axis=-2)
    lower, reads_k = linalg.stored_once((-_next_row(reads_b), _next_row(reads_k)), narrow)
    inverse = linalg.inverse_unit_lower(lower, narrow)

    # The sums over a chunk cancel if keys repeat, so their terms are not rounded to bfloat16, and
    # all factors of v are added before the product with v.
    b_at_end, k_at_end = (x.astype(to_end.dtype) * to_end for x in (b, k))
    by_step = linalg.matmul(scores_b, linalg.stored_once(inverse, narrow))
    at_end = linalg.matmul_tn(inverse, b_at_end, narrow)
    factor = linalg.matmul_tn(reads_k, at_end, narrow) + k_at_end
    return FactoredMap(
        scores=by_step,
        reads=decays.scaled(q, from_start),
        decay=decays.of_chunk(g, from_start, repeat=narrow)[..., 0, :, None],
        write=at_end.astype(k.dtype),
        erase=decays.scaled(a, before_step),
        outputs=product(linalg.matmul(by_step, reads_k) + scores_k, v),
        offset=product(factor, v, WRITE) if narrow else product(factor.mT, v),
    )


def _next_row(rows: Array) -> Array:
    """Move every row down by one, with zeros in the first."""
    return jnp.concatenate([jnp.zeros_like(rows[..., :1, :]), rows[..., :-1, :]], axis=-2)


_GENERALIZED_DELTA_RULE = MatrixRecurrence(
    "generalized_delta_rule",
    _step,
    _chunk,
    {"k": "B T G K", "a": "B T G K | B T H K", "b": "B T G K | B T H K"},
    reads_before_decay=("a",),
    has_kernels=True,
    mixed=True,
    cpu_chunks_from=(96 * 96,) * 3,
)
