"""Linear recurrences whose transitions are block-diagonal or dense matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.core.linalg import matmul
from seqjax.ops.elementwise.block_recurrence import apply_blocks, block_recurrence
from seqjax.types import Array, Inexact, Reset

COLUMNS = {
    "x": "B T G K C",
    "transition": "B T G K K | T G K K | G K K",
    "initial_state": "B G K C",
}
PATTERNS = COLUMNS | {"x": "B T G K", "initial_state": "B G K"}


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> Any:
    """Return the specs of (outputs, final state): split as the arguments are."""
    columns = out[0].ndim == 5
    patterns = COLUMNS if columns else PATTERNS
    x, state = patterns["x"], patterns["initial_state"]
    return explicit_mesh.by_axes(patterns, x, state)(arguments, out)


@explicit_mesh.auto_inside(_specs)
def block_scan(
    transition: Inexact[Array, "B T G K K"] | Inexact[Array, "T G K K"] | Inexact[Array, "G K K"],
    x: Inexact[Array, "B T G K *C"],
    initial_state: Inexact[Array, "B G K *C"] | None = None,
    *,
    reset: Reset | None = None,
    reverse: bool = False,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Inexact[Array, "B T G K *C"], Inexact[Array, "B G K *C"]]:
    """Compute a linear recurrence with block-diagonal transitions.

        h_t = A_t h_{t-1} + x_t          h [G, K] in G blocks of K, or [G, K, C]

    A is `transition`. Where `reset` is true, h_{t-1} is cleared first. A dense transition is a
    single block, G = 1. C states per block share the transition. Use `linear_scan` for diagonal
    transitions. Sources: block-diagonal input-dependent RNNs, arXiv 2309.07412; LinOSS, 2410.03943;
    the parallel LMU, 2102.11417.

    Args:
      transition: [B, T, G, K, K], [T, G, K, K] for one that the batch shares, or [G, K, K] for one
        that is constant in time. It may be complex.
      x: [B, T, G, K] or [B, T, G, K, C].
      initial_state: [B, G, K] or [B, G, K, C], as `x`; by default zeros.
      reset: [B, T] bool.
      reverse: run from the last step to the first. `initial_state` then enters at the last step,
        and the final state is that of the first step.
      algorithm: "sequential" (step by step), "associative" (log depth) or "chunked" (log depth
        inside chunks, which run one after the other). By default sequential on CPU, and chunked
        elsewhere. A constant transition has its powers computed once; a step then costs log2 of
        the chunk products of a block with a state. Other transitions cost products of blocks.
      implementation: "xla" or None.
      chunk_size: steps in a chunk; by default 64.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (h, in the shape and dtype of `x`; final state in float32, or float64 if any argument is;
      both complex if any argument is complex).

    Raises:
      ValueError: if shapes or dtypes do not fit.
      NotImplementedError: if the implementation does not support the call or the platform.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> swap = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
      >>> h, last = seqjax.block_scan(swap, jnp.zeros((1, 2, 1, 2)), jnp.array([[[1.0, 2.0]]]))
      >>> h[0, :, 0].tolist(), last.tolist()
      ([[2.0, 1.0], [1.0, 2.0]], [[[1.0, 2.0]]])
    """
    op = "block_scan"
    given = checks.as_arrays({"x": x, "transition": transition, "initial_state": initial_state})
    columns = given["x"] is not None and given["x"].ndim == 5
    sizes = checks.check_shapes(op, COLUMNS if columns else PATTERNS, given)
    checks.check_dtypes(op, given, complex_ok=True)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "associative", "chunked"), length=sizes["T"]
    )
    # The op has no kernel, so an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=sizes["T"])
    state = checks.state_dtype(*given.values())
    x, A, h0 = given["x"], given["transition"], given["initial_state"]
    if not columns:
        x, h0 = x[..., None], None if h0 is None else h0[..., None]
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], *x.shape[2:]), state)
    h, final = _scan(
        A.reshape((1,) * (5 - A.ndim) + A.shape),
        x,
        h0,
        reset,
        state=state,
        out=checks.output_dtype(*given.values()),
        on_cpu=algorithm or "sequential",
        elsewhere=algorithm or ("chunked" if backends.pays_off(sizes["T"]) else "sequential"),
        chunk_size=chunk_size or 64,
        reverse=reverse,
        sequence_axis=sequence_axis,
    )
    return (h, final) if columns else (h[..., 0], final[..., 0])


@functools.partial(
    jax.jit,
    static_argnames=(
        "state",
        "out",
        "on_cpu",
        "elsewhere",
        "chunk_size",
        "reverse",
        "sequence_axis",
    ),
)
def _scan(
    A: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    state: Any,
    out: Any,
    on_cpu: str,
    elsewhere: str,
    chunk_size: int,
    reverse: bool,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    A, x, h0, reset = jax_compat.match_varying(A, x, h0, reset)
    A, x, h0 = (array.astype(state) for array in (A, x, h0))
    cuts = () if reset is None else (reset,)

    def by(algorithm: str, x: Array, h0: Array, *cuts: Array) -> tuple[Array, Array]:
        return block_recurrence(
            A,
            x,
            h0,
            cuts[0] if cuts else None,
            algorithm=algorithm,
            chunk_size=chunk_size,
            reverse=reverse,
        )

    def local(h0: Array, x: Array = x) -> tuple[Array, Array]:
        return backends.by_platform(by, on_cpu, elsewhere, x, h0, *cuts)

    if sequence_axis is None:
        h, final = local(h0)
        return h.astype(out), final
    if A.shape[1] == 1:
        transition = jnp.broadcast_to(_power(A[:, 0], x.shape[1]), (x.shape[0], *A.shape[2:]))
    else:
        identity = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=state), (x.shape[0], *A.shape[2:]))
        zero = jnp.zeros((*x.shape[:2], *A.shape[2:]), state)
        _, transition = local(*jax_compat.match_varying(identity, zero, A)[:2])
    h, final = sequence_parallel.run_split(
        local, transition, h0, reset, sequence_axis, reverse=reverse, apply=apply_blocks
    )
    return h.astype(out), final


def _power(A: Array, exponent: int) -> Array:
    """Return a matrix power by repeated squaring, exponent >= 1."""
    if exponent == 1:
        return A
    half = _power(A, exponent // 2)
    squared = matmul(half, half)
    return matmul(squared, A) if exponent % 2 else squared
