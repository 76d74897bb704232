"""The elementwise linear recurrence, h_t = a_t h_{t-1} + x_t."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.elementwise.linear_recurrence import kernel_use, with_adjoint
from seqjax.types import Array, Inexact, Reset

PATTERNS = {"x": "B T D", "decay": "B T D | T D | D", "initial_state": "B D"}


@explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T D", "B D"))
def linear_scan(
    decay: Inexact[Array, "B T D"] | Inexact[Array, "T D"] | Inexact[Array, "D"],
    x: Inexact[Array, "B T D"],
    initial_state: Inexact[Array, "B D"] | None = None,
    *,
    reset: Reset | None = None,
    reverse: bool = False,
    algorithm: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    unroll: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """Elementwise linear recurrence over time.

        h_t = a_t * h_{t-1} + x_t          h_0 = initial_state,   a = decay

    Where `reset` is true the state is cleared first: h_t = x_t, whatever a_t and h_{t-1} hold.
    With `reverse` time runs from the last step to the first, initial state and resets included.

    LRU, S5, S4D, RG-LRU, HGRN, minGRU and moving averages are this recurrence. It parallelises
    over time because the maps h -> a h + x compose to maps of the same form (Blelloch, Prefix
    sums and their applications, 1990; Martin and Cundy, arXiv 1709.04057). Both derivative modes
    of every order are again linear scans: nothing is stored but `decay` and the outputs.

    Args:
      decay: [B, T, D], or [T, D] or [D] where it is shared; real or complex. Magnitudes up to 1
        are safe in every form. "sequential" also takes larger ones, as long as the states are
        finite. The other forms multiply decays of consecutive steps. "associative" multiplies up
        to T of them, "chunked" up to `chunk_size`, `sequence_axis` those of one device, and the
        kernel for GPU those of a part of T. These products must stay in the range of the state's
        dtype, in float32 1e-38 to 3e38. Beyond it the result may be NaN, or a state may be lost,
        although the recurrence is finite. Underflow is safe unless later decays grow again.
      x: [B, T, D], real or complex.
      initial_state: [B, D], zeros if None; the final state of an earlier call.
      reset: [B, T] bool.
      reverse: run backwards in time.
      algorithm: "sequential" (one step after the other), "associative" (log depth, with
        temporaries of the size of `x`), "chunked" (log depth inside chunks, chunks one after the
        other), or None: sequential when compiled for CPU or as a kernel. On GPU the
        default is associative while the states take at most 2 GiB, and chunked above; on
        other platforms it is associative up to T = 4096.
      implementation: "xla", "pallas" (a kernel, sequential; for TPU, and for GPU from Hopper on)
        or None: the kernel when compiled for TPU or a Hopper GPU, if it takes the dtypes (not
        float16, not float64) and the compiler need not split it over devices, which
        `jax.shard_map` spares it. On GPU, rows of D numbers must be multiples of 16 bytes. There
        the default is XLA for calls with `block_sizes`, and for long calls of few thread blocks
        (more than 1024 steps each in fewer than 44 blocks of 128 features).
      chunk_size: steps in a chunk of the chunked algorithm; 256 if None.
      unroll: steps in an iteration of the sequential algorithm's loop; 4 if None (1 in the
        backward pass).
      block_sizes: of the kernel, (steps, a multiple of 16; features, one of 128 or all of them; on
        GPU 128); chosen by shape if None.
      interpret: run the kernel for TPU without its hardware, slowly: to try it.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split. `initial_state`
        and the final state are then those of the whole sequence, the same on every device.

    Returns:
      (h [B, T, D], final state [B, D]). The first has the dtype of `x`, the second float32 for
      float32 and narrower input, float64 for float64; both are complex if any input is.

    Raises:
      ValueError: for shapes or dtypes that do not fit, or an unknown algorithm.
      NotImplementedError: for an implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> h, last = seqjax.linear_scan(jnp.array([0.5]), jnp.ones((1, 3, 1)))
      >>> h[0, :, 0].tolist(), last.tolist()
      ([1.0, 1.5, 1.75], [[1.75]])
    """
    op = "linear_scan"
    given = checks.as_arrays({"x": x, "decay": decay, "initial_state": initial_state})
    sizes = checks.check_shapes(op, PATTERNS, given)
    checks.check_dtypes(op, given, complex_ok=True)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size, unroll=unroll)
    algorithm = backends.resolve(
        op,
        algorithm,
        implementation,
        algorithms=("sequential", "associative", "chunked"),
        length=sizes["T"],
    )
    state, out = checks.state_dtype(*given.values()), checks.output_dtype(*given.values())
    h0 = given["initial_state"]
    h0 = jnp.zeros((sizes["B"], sizes["D"]), state) if h0 is None else h0.astype(state)
    decay = given["decay"].reshape((1,) * (3 - given["decay"].ndim) + given["decay"].shape)
    arrays = (decay, given["x"], h0)
    _check_block_sizes(block_sizes, sizes["D"])
    return _run(
        *arrays,
        reset,
        use=kernel_use(algorithm, implementation, interpret, block_sizes, *arrays),
        block_sizes=block_sizes,
        reverse=reverse,
        out_dtype=out,
        algorithm=algorithm,
        chunk_size=chunk_size,
        unroll=unroll,
        sequence_axis=sequence_axis,
    )


def _check_block_sizes(given: tuple[int, int] | None, features: int) -> None:
    if given is None:
        return
    steps, columns = given
    if steps < 16 or steps % 16 or columns < 1 or (columns % 128 and columns != features):
        raise ValueError(
            "linear_scan: `block_sizes` must be (a multiple of 16, a multiple of 128 or "
            f"D={features}), got {given}."
        )


@functools.partial(
    jax.jit,
    static_argnames=(
        "use",
        "block_sizes",
        "reverse",
        "out_dtype",
        "algorithm",
        "chunk_size",
        "unroll",
        "sequence_axis",
    ),
)
def _run(
    a: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    reverse: bool,
    sequence_axis: str | None,
    **params: Any,
) -> tuple[Array, Array]:
    a, x, h0, reset = jax_compat.match_varying(a, x, h0, reset)

    def local(h0: Array, x: Array = x) -> tuple[Array, Array]:
        return with_adjoint(a, x, h0, reset, reverse=reverse, **params)

    if sequence_axis is None:
        return local(h0)
    _, transition = local(jnp.ones_like(h0), jnp.zeros_like(x))
    return sequence_parallel.run_split(local, transition, h0, reset, sequence_axis, reverse=reverse)
