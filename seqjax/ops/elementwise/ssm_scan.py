"""Diagonal state-space models that are constant in time, without an array of all states."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.core.checkpointed_scan import time_scan
from seqjax.ops.core.custom_adjoint import custom_adjoint, unless_differentiated
from seqjax.ops.core.linalg import everywhere
from seqjax.ops.elementwise.linear_recurrence import recurrence
from seqjax.ops.elementwise.xla_algorithms import ScanOptions
from seqjax.types import Array, Float, Inexact, Reset

PATTERNS = {"u": "B T D", "A": "D N", "B": "D N", "C": "D N", "initial_state": "B D N"}


@explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T D", "B D N"))
def ssm_scan(
    u: Float[Array, "B T D"],
    A: Inexact[Array, "D N"],
    B: Inexact[Array, "D N"],
    C: Inexact[Array, "D N"],
    initial_state: Inexact[Array, "B D N"] | None = None,
    *,
    reset: Reset | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
    """Compute a diagonal state-space model whose parameters are constant in time.

        h_t = exp(A) * h_{t-1} + B u_t          h [D, N], real or complex
        y_t = Re(sum over N of C * h_t)

    Where `reset` is true, h_{t-1} is cleared first. A, B and C are discrete: scale them by the step
    size first. The states [B, T, D, N] are never all in memory. Use `selective_scan` if B, C or
    the step size depend on the input, and `linear_scan` if you need the states themselves. Sources:
    S4D, arXiv 2206.11893; the moving average of MEGA, 2209.10655.

    Args:
      u: [B, T, D], real.
      A: [D, N], logarithms of the decays; Re(A) <= 0 for a state that does not grow.
      B: [D, N].
      C: [D, N].
      initial_state: [B, D, N]; by default zeros.
      reset: [B, T] bool.
      algorithm: "sequential" (step by step) or "chunked" (in parallel over all steps: a convolution
        inside chunks, and a recurrence of one state per chunk). By default chunked, but sequential
        for a forward pass on CPU.
      implementation: "xla" or None.
      chunk_size: steps in a chunk; by default 32. A step of the chunked algorithm costs one product
        for each step of the chunk.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (y [B, T, D] in the dtype of `u`, final state [B, D, N] in float32, or float64 if any argument
      is; complex if A, B, C or the initial state is).

    Raises:
      ValueError: if shapes or dtypes do not fit, or `u` is complex.
      NotImplementedError: if the implementation does not support the call or the platform.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 1))
      >>> y, h = seqjax.ssm_scan(jnp.ones((1, 3, 1)), jnp.log(0.5 * one), one, 2 * one)
      >>> y.ravel().tolist(), h.tolist()
      ([2.0, 3.0, 3.5], [[[1.75]]])
    """
    op = "ssm_scan"
    given = checks.as_arrays({"u": u, "A": A, "B": B, "C": C, "initial_state": initial_state})
    sizes = checks.check_shapes(op, PATTERNS, given)
    checks.check_dtypes(op, {"u": given["u"]}, complex_ok=False)
    checks.check_dtypes(op, given, complex_ok=True)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "chunked"), length=sizes["T"]
    )
    # The op has no kernel, so an explicit choice of one raises.
    backends.select_backend(op, algorithm, implementation, length=sizes["T"])
    state = checks.state_dtype(*given.values())
    h0 = given.pop("initial_state")
    if h0 is None:
        h0 = jnp.zeros((sizes["B"], sizes["D"], sizes["N"]), state)
    parallel = backends.pays_off(sizes["T"])
    return _scan(
        *given.values(),
        h0.astype(state),
        reset,
        on_cpu=algorithm or ("by derivative" if parallel else "sequential"),
        elsewhere=algorithm or ("chunked" if parallel else "sequential"),
        chunk_size=chunk_size or 32,
        sequence_axis=sequence_axis,
    )


@functools.partial(jax.jit, static_argnames=("on_cpu", "elsewhere", "chunk_size", "sequence_axis"))
def _scan(
    u: Array,
    A: Array,
    B: Array,
    C: Array,
    h0: Array,
    reset: Array | None,
    *,
    on_cpu: str,
    elsewhere: str,
    chunk_size: int,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    u, A, B, C, h0, reset = jax_compat.match_varying(u, A, B, C, h0, reset)
    out, state = u.dtype, h0.dtype
    real = jnp.finfo(state).dtype
    A, B, C = (weight.astype(state) for weight in (A, B, C))

    def by(
        algorithm: str, u: Array, A: Array, B: Array, C: Array, h0: Array, reset: Array | None
    ) -> tuple[Array, Array]:
        if algorithm == "by derivative":  # gradients by chunks are faster
            ways = (functools.partial(by, name) for name in ("sequential", "chunked"))
            found: tuple[Array, Array] = unless_differentiated(*ways)(u, A, B, C, h0, reset)
            return found
        if algorithm == "sequential":
            return _sequential(u, A, B, C, h0, reset, out, chunk_size)
        y, h = _chunked(u.astype(real), A, B, C, h0, reset, chunk_size)
        return y.astype(out), h

    def local(h0: Array) -> tuple[Array, Array]:
        return backends.by_platform(by, on_cpu, elsewhere, u, A, B, C, h0, reset)

    if sequence_axis is None:
        return local(h0)
    transition = jnp.broadcast_to(jnp.exp(u.shape[1] * A), h0.shape)
    return sequence_parallel.run_split(local, transition, h0, reset, sequence_axis)


def real_of(a: Array, b: Array, product: Any) -> Array:
    """Return the real part of a bilinear product of two real or two complex arrays."""
    if not jnp.iscomplexobj(a):
        return product(a, b)
    (a_real, a_imag), (b_real, b_imag) = jax_compat.parts(a), jax_compat.parts(b)
    return product(a_real, b_real) - product(a_imag, b_imag)


def _sequential(
    u: Array,
    A: Array,
    B: Array,
    C: Array,
    h0: Array,
    reset: Array | None,
    out: Any,
    chunk_size: int,
) -> tuple[Array, Array]:
    state = h0.dtype
    # Inside, states are [B, N, D], so that reductions are never over the minor axis. Each
    # sequence has its own copy of the weights, whose gradients are summed once, at the end.
    shared = tuple(everywhere(weight.T, u.shape[:1]) for weight in (jnp.exp(A), B, C))

    def step(h: Array, inputs: Any, decay: Array, B: Array, C: Array) -> tuple[Array, Array]:
        u, cut = inputs
        if cut is not None:
            h = jnp.where(cut[:, None, None], jnp.zeros_like(h), h)
        h = decay * h + B * u[:, None].astype(state)
        return h, jnp.sum(real_of(C, h, jnp.multiply), axis=1).astype(out)

    y, h = time_scan(step, h0.mT, (u, reset), chunk_size, shared=shared)
    return y, h.mT


def _chunked(
    u: Array, A: Array, B: Array, C: Array, h0: Array, reset: Array | None, chunk_size: int
) -> tuple[Array, Array]:
    """Run chunks of one size, and the rest as a shorter chunk."""
    length = u.shape[1]
    size = min(chunk_size, length)
    powers = jnp.exp(jnp.arange(size + 1).astype(A.dtype)[:, None, None] * A)  # [j, D, N]
    whole = length // size * size
    parts, h = [], h0
    for start, stop, steps in ((0, whole, size), (whole, length, length - whole)):
        if steps:
            cut = None if reset is None else reset[:, start:stop]
            y, h = _chunks(u[:, start:stop], powers[: steps + 1], B, C, h, cut)
            parts.append(y)
    return jnp.concatenate(parts, axis=1), h


def _chunks(
    u: Array, powers: Array, B: Array, C: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array]:
    """Run all chunks of powers.shape[0] - 1 steps at once; T is a multiple of that."""
    shape, size = u.shape, powers.shape[0] - 1
    u = u.reshape(shape[0], -1, size, shape[2])
    any_reset = alive = None
    if reset is not None:
        reset = reset.reshape(u.shape[:3])
        any_reset = reset.any(axis=2)
        # The steps whose input, or whose entering state, no later or earlier reset discards.
        count = jnp.cumsum(reset, axis=2)
        alive, last = count == 0, count == count[..., -1:]
        ends = jnp.where(last[..., None], u, jnp.zeros_like(u))
    else:
        ends = u
    kernel = jnp.sum(real_of(C * B, powers[:-1], jnp.multiply), axis=-1)  # [size, D]
    y = _convolve(kernel, u, reset)
    write = powers[:-1][::-1] * B
    added = _einsum("bcsd,sdn->bcdn", ends.astype(write.dtype), write)
    flat = (*added.shape[:2], -1)
    states, final = recurrence(
        powers[-1].reshape(1, 1, -1),
        added.reshape(flat),
        h0.reshape(shape[0], -1),
        any_reset,
        ScanOptions(h0.dtype),
    )
    entering = jnp.concatenate([h0[:, None], states.reshape(added.shape)[:, :-1]], axis=1)
    if alive is not None:  # a state that is cleared at once may not be finite
        entering = jnp.where(alive[:, :, 0, None, None], entering, jnp.zeros_like(entering))
    carried = real_of(entering, C * powers[1:], functools.partial(_einsum, "bcdn,tdn->bctd"))
    if alive is not None:
        carried = jnp.where(alive[..., None], carried, jnp.zeros_like(carried))
    return (y + carried).reshape(shape), final.reshape(h0.shape)


def _einsum(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, precision="highest")


def _convolve(kernel: Array, u: Array, reset: Array | None) -> Array:
    """Return y_t = sum over j of kernel_j u_{t-j} inside chunks, back to the last reset.

    Args:
      kernel: [size, D].
      u: [B, chunks, size, D].
      reset: [B, chunks, size] or None.

    A loop over j shifts the inputs by one step per turn and selects zero at resets. A matrix
    product would spread a non-finite input over its whole chunk.
    """

    def shifted(u: Array, reset: Array | None) -> Array:
        """Move u one step later; nothing moves to a reset."""
        later = jnp.pad(u[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        return _unless(reset, later)

    def unshifted(dy: Array, reset: Array | None) -> Array:
        """Move dy one step earlier: the transpose of `shifted`."""
        return jnp.pad(_unless(reset, dy)[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))

    def forward(kernel: Array, u: Array, reset: Array | None) -> Array:
        def turn(carry: tuple[Array, Array], tap: Array) -> tuple[tuple[Array, Array], None]:
            y, u = carry
            return (y + tap * u, shifted(u, reset)), None

        return lax.scan(turn, (kernel[0] * u, shifted(u, reset)), kernel[1:])[0][0]

    def adjoint(args: Any, dy: Array) -> list[Array]:
        kernel, u, reset = args

        def turn(carry: Any, tap: Array) -> Any:
            du, u, moved = carry
            d_tap = jnp.sum(dy * u, axis=(0, 1, 2))
            return (du + tap * moved, shifted(u, reset), unshifted(moved, reset)), d_tap

        (du, *_), d_kernel = lax.scan(turn, (jnp.zeros_like(u), u, dy), kernel)
        return [d_kernel, du]

    return custom_adjoint(forward, adjoint)(kernel, u, reset)


def _unless(reset: Array | None, u: Array) -> Array:
    return u if reset is None else jnp.where(reset[..., None], jnp.zeros_like(u), u)
