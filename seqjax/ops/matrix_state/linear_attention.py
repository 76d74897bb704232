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

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax.numpy as jnp

from seqjax.ops.core import checks, explicit_mesh, linalg
from seqjax.ops.matrix_state import chunked, decays
from seqjax.ops.matrix_state.factored_chunks import FactoredMap
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.ops.matrix_state.value_decay import VALUE_DECAY
from seqjax.types import Array, Inexact, Reset


@overload
def linear_attention(
    q: Inexact[Array, "B T G K"],
    k: Inexact[Array, "B T G K"],
    v: Inexact[Array, "B T H V"],
    log_decay: Inexact[Array, "B T H"] | Inexact[Array, "B T H K"] | None = None,
    initial_state: tuple[Inexact[Array, "B H K V"], Inexact[Array, "B H K"]] | None = None,
    *,
    normalizer: Literal[True],
    scale: float | Array | None = None,
    exclusive: bool = False,
    bonus: Inexact[Array, "H K"] | Inexact[Array, "H"] | None = None,
    value_log_decay: None = None,
    state_dtype: Any = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[
    tuple[Inexact[Array, "B T H V"], Inexact[Array, "B T H"]],
    tuple[Inexact[Array, "B H K V"], Inexact[Array, "B H K"]],
]: ...


@overload
def linear_attention(
    q: Inexact[Array, "B T G K"],
    k: Inexact[Array, "B T G K"],
    v: Inexact[Array, "B T H V"],
    log_decay: Inexact[Array, "B T H"] | Inexact[Array, "B T H K"] | None = None,
    initial_state: Inexact[Array, "B H K V"] | None = None,
    *,
    scale: float | Array | None = None,
    exclusive: bool = False,
    bonus: Inexact[Array, "H K"] | Inexact[Array, "H"] | None = None,
    normalizer: Literal[False] = False,
    value_log_decay: Inexact[Array, "B T H V"] | None = None,
    state_dtype: Any = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> tuple[Inexact[Array, "B T H V"], Inexact[Array, "B H K V"]]: ...


def linear_attention(
    q: Inexact[Array, "B T G K"],
    k: Inexact[Array, "B T G K"],
    v: Inexact[Array, "B T H V"],
    log_decay: Inexact[Array, "B T H"] | Inexact[Array, "B T H K"] | None = None,
    initial_state: Any = None,
    *,
    scale: float | Array | None = None,
    exclusive: bool = False,
    bonus: Inexact[Array, "H K"] | Inexact[Array, "H"] | None = None,
    normalizer: bool = False,
    value_log_decay: Inexact[Array, "B T H V"] | None = None,
    state_dtype: Any = None,
    reset: Reset | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> Any:
    """Compute linear attention with decay over time.

        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        S [K, V],   g = log_decay
        o_t = scale * S_t^T q_t

    Where `reset` is true, S_{t-1} is cleared first. Published forms differ in the decay:

    - none: Katharopoulos et al., arXiv 2006.16236;
    - one per head: RetNet (2307.08621) and Mamba-2 (2405.21060);
    - one per key channel: GLA (2312.06635), RWKV-6 and HGRN2;
    - complex, per key channel: GateLoop (2311.01927).

    With `exclusive`, outputs read the state before the decay and the write of their step, as in
    RWKV-5 and RWKV-6 (2404.05892):

        o_t = scale * (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t

    With `normalizer`, the op also returns the sums that Katharopoulos et al. and the mLSTM (xLSTM,
    2405.04517) divide by: the same recurrence on values of 1. It runs with V + 1 columns.

        n_t = diag(exp g_t) n_{t-1} + k_t,    z_t = scale * n_t^T q_t

    With `value_log_decay` h, columns decay in place of rows, as in Gated Slot Attention
    (2409.07146):

        S_t = S_{t-1} diag(exp h_t) + k_t v_t^T

    The op does not conjugate `q`: pass the conjugate if the paper uses one.

    Args:
      q, k: [B, T, G, K], real or complex. G divides H; head h uses q and k of head h // (H / G).
      v: [B, T, H, V].
      log_decay: None, [B, T, H] or [B, T, H, K]; real parts in [-inf, 0] for a stable state.
      initial_state: [B, H, K, V]; with `normalizer` a pair of it and [B, H, K]; by default zeros.
      scale: factor of the queries, a real number or scalar array; by default K**-0.5. New values
        do not recompile.
      exclusive: whether outputs read S_{t-1}, after the reset and before the decay.
      bonus: [H, K] or [H], the weight of the own step of an exclusive read; by default 0.
      normalizer: whether to return the sums z and n.
      value_log_decay: [B, T, H, V], in [-inf, 0]; it excludes `log_decay` and `normalizer`.
      state_dtype: bfloat16 for a final state of half the size; by default float32 or float64. All
        sums inside a call stay in float32, and the carried state is rounded once per call. Token by
        token, the outputs of 4,096 tokens then had a relative error (root mean square) of 0.3 % for
        decays of 0.9, 1.2 % for 0.99, 4.3 % for 0.999 and 5.9 % without decay.
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
      argument is); both complex if any argument is. With `normalizer` ((o, z [B, T, H]), (final
      state, n [B, H, K])).

    Raises:
      ValueError: if shapes, dtypes or block sizes do not fit, `bonus` is given without `exclusive`,
        `value_log_decay` with `log_decay` or `normalizer`, or `block_sizes` with
        implementation="xla".
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform, or `block_sizes` are given and the kernel does not support the call.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 3, 1, 1))
      >>> o, S = seqjax.linear_attention(one, one, one, jnp.log(one / 2))
      >>> [round(float(value), 4) for value in o.ravel()]
      [1.0, 1.5, 1.75]
    """
    inputs, run = {"q": q, "k": k, "v": v}, _normalized if normalizer else _LINEAR_ATTENTION
    if value_log_decay is not None:
        if normalizer or log_decay is not None:
            other = "normalizer" if normalizer else "log_decay"
            raise ValueError(
                f"linear_attention: `value_log_decay` must be None with `{other}`, got an array."
            )
        inputs, run = inputs | {"value_log_decay": value_log_decay}, VALUE_DECAY
    return run(
        inputs,
        log_decay,
        initial_state,
        scale=scale,
        exclusive=exclusive,
        bonus=bonus,
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
    del S
    return decayed + linalg.outer(x["k"], x["v"])


def _chunk(x: chunked.Arrays) -> FactoredMap:
    q, k, v, g = (x[name] for name in ("q", "k", "v", "log_decay"))
    [[scores]] = decays.decayed_products((q,), (k,), g)
    from_start, to_end = decays.cumulative_decays(g, scores.dtype, repeat=k.dtype == jnp.bfloat16)
    return FactoredMap(
        scores=scores,
        reads=decays.scaled(q, decays.widen(from_start, q.shape[-1])),
        decay=decays.of_chunk(g, from_start, repeat=k.dtype == jnp.bfloat16)[..., 0, :, None],
        write=decays.scaled(k, decays.widen(to_end, k.shape[-1])),
        values=v,
    )


_LINEAR_ATTENTION = MatrixRecurrence(
    "linear_attention",
    _step,
    _chunk,
    {"k": "B T G K"},
    complex_ok=True,
    has_kernels=True,
    mixed=True,
    diagonal=True,
    cpu_chunks_from=(1, 32 * 32, 32 * 32),
)


def _normalized_specs(arguments: Mapping[str, Any], out: Any) -> Any:
    """Return the specs of ((outputs, sums), (final state, its sums)), split as the inputs are."""
    given, (_, (state, sums)) = {**arguments, **arguments["inputs"]}, out
    initial, patterns = given.pop("initial_state"), _LINEAR_ATTENTION.patterns
    initial = (None, None) if initial is None else initial
    matrix = explicit_mesh.by_axes(patterns, "B T H V", "B H K V")
    vector = explicit_mesh.by_axes(patterns, "B T H", "B H K")
    o, S = matrix(given | {"initial_state": initial[0]}, state)
    z, n = vector(given | {"initial_state": initial[1]}, sums)
    return (o, z), (S, n)


@explicit_mesh.auto_inside(_normalized_specs)
def _normalized(
    inputs: dict[str, Array], log_decay: Array | None, initial_state: Any, **keywords: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Run linear attention with a column of ones in the values: the normalizer."""
    pair = isinstance(initial_state, tuple | list) and len(initial_state) == 2
    if initial_state is not None and not (pair and all(x is not None for x in initial_state)):
        raise ValueError(
            "linear_attention: `initial_state` must be a pair of the state and its sums with"
            " `normalizer`, as the op returns it, or None."
        )
    memory, sums = (None, None) if initial_state is None else initial_state
    patterns = _LINEAR_ATTENTION.patterns
    given = checks.as_arrays({**inputs, "log_decay": log_decay, "initial_state": memory})
    if memory is not None:
        patterns, given["normalizer"] = patterns | {"normalizer": "B H K"}, jnp.asarray(sums)
    checks.check_shapes("linear_attention", patterns, given)
    v, memory = given["v"], given["initial_state"]
    columns = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if memory is not None:
        memory = jnp.concatenate([memory, given["normalizer"][..., None]], axis=-1)
    o, S = _LINEAR_ATTENTION(inputs | {"v": columns}, log_decay, memory, **keywords)
    return (o[..., :-1], o[..., -1]), (S[..., :-1], S[..., -1])
