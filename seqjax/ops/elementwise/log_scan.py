"""The elementwise recurrence of a maximum or of a logsumexp, with a decay.

    h_t = max(h_{t-1} + d_t, x_t)              semiring="max"
    h_t = log(e^{h_{t-1} + d_t} + e^{x_t})     semiring="log"

`monoid_scan` computes the maximum m. The logsumexp is m_t + log u_t, where u_t is the sum times
exp(-m_t): a `linear_scan` with decays and inputs of at most 1. The tangents of both obey a linear
recurrence,

    dh_t = p_t (dh_{t-1} + dd_t) + q_t dx_t,

with p_t + q_t = 1: in "log" the softmax of (h_{t-1} + d_t, x_t), in "max" a selection. So forward
mode is one `linear_scan`, reverse mode its transpose, and no derivative divides or subtracts -inf.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.elementwise.linear_scan import linear_scan
from seqjax.ops.monoid_scan import monoid_scan
from seqjax.types import Array, Float, Reset

PATTERNS = {"x": "B T D", "log_decay": "B T D | T D | D", "initial_state": "B D"}
SEMIRINGS = ("log", "max")
Pair = tuple[Array, Array]


@explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T D", "B D"))
def log_scan(
    log_decay: Float[Array, "B T D"] | Float[Array, "T D"] | Float[Array, "D"] | None,
    x: Float[Array, "B T D"],
    initial_state: Float[Array, "B D"] | None = None,
    *,
    semiring: str = "log",
    reset: Reset | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Compute an elementwise running logsumexp or maximum with decay over time.

        h_t = log(exp(h_{t-1} + d_t) + exp(x_t))       semiring="log",   d = log_decay
        h_t = max(h_{t-1} + d_t, x_t)                  semiring="max"

    Where `reset` is true, h_t = x_t. "log" is `linear_scan` of positive numbers in logarithms: the
    normalizer of LightNet (arXiv 2405.21022) and Aaren (2405.13956). "max" is the stabilizer of
    exponential gates: mLSTM (2405.04517) and RWKV-4 (2305.13048).

    Unlike in the other ops, the default state is -inf, the logarithm of zero. Values of -inf are
    allowed in every argument and give no NaN. The result for +inf is not defined.

    Args:
      log_decay: [B, T, D], or [T, D] or [D] where it is shared; None for 0. Any sign is stable.
      x: [B, T, D], real.
      initial_state: [B, D], the final state of an earlier call; by default -inf.
      semiring: "log" or "max". Where both arguments of the maximum are equal, each gets half of the
        gradient.
      reset: [B, T] bool.
      algorithm: "sequential", "associative", or "chunked" (log depth inside chunks, which run one
        after the other). By default the maximum is sequential when compiled for CPU and chunked
        elsewhere, and the sums and derivatives have the default of `linear_scan`.
      implementation: "xla" or None.
      chunk_size: steps in a chunk; by default 128 for the maximum, 256 for sums and derivatives.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (h [B, T, D] in the dtype of `x`, final state [B, D] in float32, or float64 if any argument
      is).

    Raises:
      ValueError: if shapes or dtypes do not fit, or a name is unknown.
      NotImplementedError: if the algorithm or implementation does not support the call.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> x = jnp.array([[[1.0], [3.0], [2.0]]])
      >>> h, last = seqjax.log_scan(jnp.array([-0.5]), x, semiring="max")
      >>> h[0, :, 0].tolist(), last.tolist()
      ([1.0, 3.0, 2.5], [[2.5]])
    """
    op = "log_scan"
    given = checks.as_arrays({"x": x, "log_decay": log_decay, "initial_state": initial_state})
    sizes = checks.check_shapes(op, PATTERNS, given)
    checks.check_dtypes(op, given, complex_ok=False)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    if semiring not in SEMIRINGS:
        raise ValueError(
            f"{op}: `semiring` must be one of {', '.join(SEMIRINGS)}, got {semiring!r}."
        )
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "associative", "chunked"), length=sizes["T"]
    )
    # The op has no kernel, so an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=sizes["T"])
    return _scan(
        given["log_decay"],
        given["x"],
        given["initial_state"],
        reset,
        semiring=semiring,
        algorithm=algorithm,
        chunk_size=chunk_size,
        sequence_axis=sequence_axis,
    )


@functools.partial(
    jax.jit, static_argnames=("semiring", "algorithm", "chunk_size", "sequence_axis")
)
def _scan(
    d: Array | None,
    x: Array,
    h0: Array | None,
    reset: Array | None,
    *,
    semiring: str,
    algorithm: str | None,
    chunk_size: int | None,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    wide, out = checks.state_dtype(d, x, h0), x.dtype
    x = x.astype(wide)
    h0 = jnp.full_like(x[:, 0], -jnp.inf) if h0 is None else h0.astype(wide)
    d = None if d is None else jnp.broadcast_to(d.astype(wide), x.shape)
    if sequence_axis is not None:
        d, x, reset = jax_compat.match_varying(d, x, reset)
    run = _with_tangents(
        semiring,
        algorithm=algorithm,
        chunk_size=chunk_size,
        sequence_axis=sequence_axis,
    )
    h, final = run(d, x, h0, reset)
    return h.astype(out), final


def _with_tangents(
    semiring: str, *, sequence_axis: str | None, **options: Any
) -> Callable[..., tuple[Array, Array]]:
    """Return (log_decay, x, initial state, reset) -> (h, final state), with the tangents above."""

    def maximum(d: Array | None, x: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        def by(algorithm: str | None, *arrays: Array) -> tuple[Array, Array]:
            h0, x, *decay = arrays
            elems, start = (x, h0) if d is None else ((decay[0], x), (jnp.zeros_like(h0), h0))
            combine = jnp.maximum if d is None else _decayed_maximum
            scanned = monoid_scan(
                combine,
                elems,
                start,
                reset=reset,
                algorithm=algorithm,
                chunk_size=options["chunk_size"],
                sequence_axis=sequence_axis,
            )
            return scanned if d is None else (scanned[0][1], scanned[1][1])

        operands = (h0, x) if d is None else (h0, x, d)
        algorithm = options["algorithm"]
        if algorithm is not None or not isinstance(x.shape[1], int):
            return by(algorithm, *operands)
        # On CPU a loop over time reads each array once, and is ten times faster.
        return backends.by_platform(by, "sequential", "chunked", *operands)

    def with_previous(d: Array | None, h0: Array, h: Array, reset: Array | None) -> Array:
        """Return h_{t-1} + d_t, -inf at a reset."""
        before = sequence_parallel.previous(h0, h, reset, sequence_axis, fill=-jnp.inf)
        return before if d is None else before + d

    @jax.custom_jvp
    def run(d: Array | None, x: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        top, last_top = maximum(d, x, h0, reset)
        if semiring == "max":
            return top, last_top
        level = jnp.where(top == -jnp.inf, 0, top)
        sums, last = linear_scan(
            jnp.exp(with_previous(d, h0, top, reset) - level),
            jnp.exp(x - level),
            jnp.ones_like(h0),
            reset=reset,
            sequence_axis=sequence_axis,
            **options,
        )
        return top + jnp.log(sums), last_top + jnp.log(last)

    @run.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        d, x, h0, reset = primals
        dd, dx, dh0, _ = tangents
        h, final = run(*primals)
        p, q = _shares(semiring, with_previous(d, h0, h, reset), x)
        added = q * dx if dd is None else p * dd + q * dx
        changes = linear_scan(p, added, dh0, reset=reset, sequence_axis=sequence_axis, **options)
        return (h, final), changes

    return run


def _decayed_maximum(early: Pair, late: Pair) -> Pair:
    return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])


def _shares(semiring: str, old: Array, new: Array) -> tuple[Array, Array]:
    """Return the derivatives of the combined value by both arguments; 0 if both are -inf."""
    none = (old == -jnp.inf) & (new == -jnp.inf)
    ahead = jnp.where(none, -jnp.inf, old - new)
    behind = jnp.where(none, -jnp.inf, new - old)
    if semiring == "log":
        return jax.nn.sigmoid(ahead), jax.nn.sigmoid(behind)
    half = jnp.asarray(0.5, old.dtype)
    return jnp.heaviside(ahead, half), jnp.heaviside(behind, half)
