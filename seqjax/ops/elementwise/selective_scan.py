"""The selective scan of Mamba: a diagonal state space with time-varying step size, B and C."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import whole_rows
from pallas_kernels.selective_scan import GPU_STATES, border_shape
from seqjax.ops.core import (
    backends,
    checks,
    explicit_mesh,
    jax_compat,
    kernel_op,
    sequence_parallel,
)
from seqjax.ops.core.checkpointed_scan import chunk_scan, time_scan
from seqjax.ops.core.linalg import down_columns, everywhere
from seqjax.ops.elementwise.linear_recurrence import recurrence
from seqjax.ops.elementwise.xla_algorithms import ScanOptions
from seqjax.types import Array, Float, Reset

Decay = Literal["exp", "signed", "online"]
DECAYS = get_args(Decay)
PATTERNS = {
    "x": "B T D",
    "dt": "B T D",
    "A": "D N",
    "B": "B T N",
    "C": "B T N",
    "D": "D",
    "initial_state": "B D N",
}


@explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T D", "B D N"))
def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"] | None,
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    *,
    reset: Reset | None = None,
    decay: Decay = "exp",
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Compute the selective state space recurrence (S6).

        h_t = a_t * h_{t-1} + (dt_t x_t) B_t^T        h [D, N]
        y_t = h_t C_t + D * x_t

        a_t = exp(dt_t A)              decay="exp", in [0, 1] for A <= 0
        a_t = 2 exp(dt_t A) - 1        decay="signed", in [-1, 1]
        a_t = 1 - dt_t (B_t^2)^T       decay="online", without A

    Where `reset` is true, h_{t-1} is cleared first. Sources: Mamba, arXiv 2312.00752, equation 2
    with its discretisation (zero-order hold for A, Euler for B); the signed range, 2411.12537;
    Longhorn's online regression, 2407.14207.

    Args:
      x: [B, T, D].
      dt: [B, T, D], the step sizes (after softplus).
      A: [D, N], real; negative for a decaying state. None for decay="online".
      B: [B, T, N].
      C: [B, T, N].
      D: [D], the skip connection; by default there is none.
      initial_state: [B, D, N]; by default zeros.
      reset: [B, T] bool.
      decay: "exp", "signed" or "online", as above. An online decay is in [0, 1] if dt_t B_t^2 is.
      algorithm: "sequential" (step by step) or "chunked" (an elementwise scan of all states of a
        chunk, which exist only while the chunk runs). By default sequential on CPU or as a kernel,
        and chunked elsewhere.
      implementation: "xla" or "pallas" (a sequential kernel for TPU and for GPU from Hopper on).
        By default the kernel runs on TPU and Hopper GPUs, if two conditions hold. It supports the
        decay ("exp"), the dtypes (not float16, not float64) and the state (N up to 64), and the
        compiler need not partition it over devices, as inside a `jax.shard_map` over all mesh axes.
        It saves one state every 64 steps. On GPU, N can be up to 16, and rows of D numbers must be
        multiples of 16 bytes. On GPU the default is XLA for calls with `block_sizes`.
      chunk_size: steps in a chunk; by default 16. The backward pass reads one saved state per
        chunk and recomputes the others. The states [B, T, D, N] are never all in memory.
      block_sizes: (steps, features) of a block of the kernel for TPU: steps a multiple of 16,
        features a multiple of 128 or D. By default 64 steps, and features so that the states of a
        step fit the registers. The kernel saves one state for each block of steps. The sizes have
        no effect where XLA runs the call by default, as on CPU. The compiler raises if a block
        exceeds its memory.
      interpret: run the kernel in interpret mode, without its hardware. This is slow.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (y [B, T, D] in the dtype of `x`, final state [B, D, N] in float32, or float64 if any
      argument is).

    Raises:
      ValueError: if shapes, dtypes or block sizes do not fit, an input is complex, or
        `block_sizes` are combined with implementation="xla".
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform, or `block_sizes` are given and the kernel does not support the call.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 2, 1))
      >>> y, h = seqjax.selective_scan(one, one, jnp.log(jnp.full((1, 1), 0.5)), one, one)
      >>> y.ravel().tolist()
      [1.0, 1.5]
    """
    op = "selective_scan"
    given = checks.as_arrays(
        {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state}
    )
    _check_decay(decay, given["A"])
    patterns = PATTERNS if decay != "online" else {k: v for k, v in PATTERNS.items() if k != "A"}
    sizes = checks.check_shapes(op, patterns, given)
    checks.check_dtypes(op, given, complex_ok=False)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "chunked"), length=sizes["T"]
    )
    if initial_state is None:
        state = checks.state_dtype(*given.values())
        given["initial_state"] = jnp.zeros((sizes["B"], sizes["D"], sizes["N"]), state)
    if block_sizes is not None:
        block_sizes = checks.check_block_sizes(op, block_sizes, "D", sizes["D"], unit=128)
    itemsize = min(given[name].dtype.itemsize for name in ("x", "dt"))
    on_gpu = sizes["N"] <= GPU_STATES and whole_rows(sizes["D"], itemsize)
    backend = backends.select_backend(
        op,
        algorithm,
        implementation,
        interpret,
        length=sizes["T"],
        unsupported=unsupported(given, sizes["N"], decay, interpret),
        excluded=() if on_gpu else ("hopper",),
        block_sizes=block_sizes,
    )
    # On CPU the sequential algorithm is fastest because it does the least work. On accelerators
    # each step costs a kernel launch or a loop iteration (measured on CPU only).
    parallel = "chunked" if backends.pays_off(sizes["T"]) else "sequential"
    return _scan(
        *given.values(),
        reset,
        backend=backend,
        on_cpu=algorithm or "sequential",
        elsewhere=algorithm or parallel,
        chunk_size=chunk_size or 16,
        decay=decay,
        sequence_axis=sequence_axis,
    )


def _check_decay(decay: Any, A: Array | None) -> None:
    if decay not in DECAYS:
        raise ValueError(
            f"selective_scan: `decay` must be one of {', '.join(map(repr, DECAYS))}, got {decay!r}."
        )
    if decay == "online" and A is not None:
        raise ValueError(
            f"selective_scan: `A` must be None with decay='online', got {list(A.shape)}; the decay"
            " is 1 - dt B^2."
        )


def unsupported(
    arrays: Mapping[str, Array | None], states: int, decay: Decay, interpret: bool
) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    dtypes = [x.dtype for x in arrays.values() if x is not None]
    refused = ("float16",) if interpret else ("float16", "float64")
    if reason := backends.unsupported_dtype(dtypes, *refused):
        return reason
    if states > 64:
        return f"supports at most 64 states per channel, got N={states}"
    if decay != "exp":
        return f"supports decay='exp' only, got {decay!r}"
    return None


@functools.partial(
    jax.jit,
    static_argnames=("backend", "on_cpu", "elsewhere", "chunk_size", "decay", "sequence_axis"),
)
def _scan(
    *arrays: Array | None,
    backend: backends.Backend,
    on_cpu: str,
    elsewhere: str,
    chunk_size: int,
    decay: Decay,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    x, dt, A, B, C, D, h0, reset = jax_compat.match_varying(*arrays)
    state = checks.state_dtype(x, dt, A, B, C, D, h0)
    if D is None:
        D = jnp.zeros_like(h0[0, :, 0])
    h0 = h0.astype(state)
    xla = functools.partial(
        _xla, on_cpu=on_cpu, elsewhere=elsewhere, chunk_size=chunk_size, decay=decay
    )

    # Only kernels for TPU take block sizes.
    blocks = {} if backend.block_sizes is None else {"block_sizes": backend.block_sizes}
    shared = {"interpret": backend.interpret} | blocks

    def forward(kernels: Any, *args: Any, save: bool) -> Any:
        x, dt, *rest, reset = args
        A, B, C, D, h0 = _for_kernel(*rest)
        y, final, borders = kernels.forward(
            x, dt, A, B, C, D, h0, reset, save_states=save, **shared
        )
        return (y, final.mT), borders if save else ()

    def backward(
        kernels: Any, args: Any, outputs: Any, borders: Array, cotangents: Any
    ) -> list[Array]:
        x, dt, *rest, reset = args
        A, B, C, D, _ = _for_kernel(*rest)
        dy, d_final = cotangents
        dx, d_dt, dA, dB, dC, dD, dh0 = kernels.backward(
            x, dt, A, B, C, D, reset, borders, dy, d_final.mT, **shared
        )
        given = (dx, d_dt, dA.T, dB, dC, dD[0], dh0.mT)
        return [ct.astype(like.dtype) for ct, like in zip(given, args[:-1], strict=True)]

    def shapes(x: Array, dt: Array, A: Array, *rest: Any) -> Any:
        *_, h0, _ = rest
        final = jax.ShapeDtypeStruct(h0.shape, state)
        shape = border_shape((*x.shape, A.shape[1]), *(backend.block_sizes or ())[:1])
        borders = jax.ShapeDtypeStruct(shape, state)
        return (jax.ShapeDtypeStruct(x.shape, x.dtype), final), borders

    run = kernel_op.kernel_op(backend, xla, forward, backward, shapes)

    def local(h0: Array) -> tuple[Array, Array]:
        return run(x, dt, A, B, C, D, h0, reset)

    if sequence_axis is None:
        return local(h0)
    if decay != "exp":  # The decays have no logarithm to sum: run the scan on ones with zero input.
        _, transition = xla(jnp.zeros_like(x), dt, A, B, C, D, jnp.ones_like(h0), reset)
    else:
        total = jnp.sum(sequence_parallel.whole_part(dt.astype(state), reset), axis=1)
        transition = jnp.exp(total[..., None] * A.astype(state))
    return sequence_parallel.run_split(local, transition, h0, reset, sequence_axis)


def _for_kernel(A: Array, B: Array, C: Array, D: Array, h0: Array) -> tuple[Array, ...]:
    """Convert the small arrays to the kernel's layout: the dtype of the state, N before D."""
    wide = h0.dtype
    return A.T.astype(wide), B.astype(wide), C.astype(wide), D[None].astype(wide), h0.mT


def _xla(
    x: Array,
    dt: Array,
    A: Array | None,
    B: Array,
    C: Array,
    D: Array,
    h0: Array,
    reset: Array | None,
    *,
    on_cpu: str,
    elsewhere: str,
    chunk_size: int,
    decay: Decay,
) -> tuple[Array, Array]:
    out, state = x.dtype, h0.dtype
    # Inside, states are [B, N, D], so that reductions are never over the minor axis. Each
    # sequence has its own copy of the weights, whose gradients are summed once, at the end.
    weights = (D,) if A is None else (D, A.T)
    shared = tuple(everywhere(weight.astype(state), x.shape[:1]) for weight in weights)

    def factors(x: Array, dt: Array, B: Array, *A: Array) -> tuple[Array, Array]:
        """Return the decay and dt B x [..., N, D], from [..., D] and [..., N]."""
        write = jnp.einsum("...n,...d->...nd", B, dt * x)
        if decay == "online":
            return 1 - jnp.einsum("...n,...d->...nd", B * B, dt), write
        a = jnp.exp(down_columns(dt, B.shape[-1]) * A[0])
        return (2 * a - 1 if decay == "signed" else a), write

    def outputs(h: Array, x: Array, C: Array, D: Array) -> Array:
        y = jnp.einsum("...nd,...n->...d", h, C, precision="highest")
        return (y + D * x).astype(out)

    def step(h: Array, inputs: tuple, D: Array, *A: Array) -> tuple[Array, Array]:
        *values, cut = inputs
        x, dt, B, C = (value.astype(state) for value in values)
        if cut is not None:
            h = jnp.where(cut[:, None, None], jnp.zeros_like(h), h)
        a, write = factors(x, dt, B, *A)
        h = a * h + write
        return h, outputs(h, x, C, D)

    def chunk(h: Array, block: tuple) -> tuple[Array, Array]:
        *values, cut = block
        x, dt, B, C = (jnp.moveaxis(value, 0, 1).astype(state) for value in values)
        cut = None if cut is None else cut.T
        D_t, *A_t = (jax.vmap(lambda w: everywhere(w, x.shape[1:2]))(w) for w in shared)
        a, write = factors(x, dt, B, *A_t)  # [B, chunk, N, D]
        flat = (*x.shape[:2], -1)
        hs, last = recurrence(
            a.reshape(flat),
            write.reshape(flat),
            h.reshape(h.shape[0], -1),
            cut,
            ScanOptions(state),
        )
        y = outputs(hs.reshape(write.shape), x, C, D_t)
        return last.reshape(h.shape), jnp.moveaxis(y, 1, 0)

    def by(algorithm: str, h0: Array) -> tuple[Array, Array]:
        h0, xs = h0.astype(state).mT, (x, dt, B, C, reset)
        if algorithm == "chunked":
            y, h = chunk_scan(chunk, h0, xs, chunk_size)
        else:
            y, h = time_scan(step, h0, xs, chunk_size, shared=shared)
        return y, h.mT

    return backends.by_platform(by, on_cpu, elsewhere, h0)
