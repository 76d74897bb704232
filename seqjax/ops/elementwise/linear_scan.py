"""The elementwise linear recurrence, h_t = a_t h_{t-1} + x_t."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import whole_rows
from pallas_kernels.linear_scan import faster_on_gpu
from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.elementwise.linear_recurrence import scan
from seqjax.ops.elementwise.xla_algorithms import ScanOptions
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
    """Compute an elementwise linear recurrence over time.

        h_t = a_t * h_{t-1} + x_t          h_0 = initial_state,   a = decay

    Where `reset` is true the state is cleared first: h_t = x_t, even if a_t or h_{t-1} is NaN.
    With `reverse` time runs from the last step to the first, initial state and resets included.

    LRU, S5, S4D, RG-LRU, HGRN, minGRU and moving averages are this recurrence. It parallelizes
    over time because the maps h -> a h + x compose to maps of the same form (Blelloch, Prefix
    sums and their applications, 1990; Martin and Cundy, arXiv 1709.04057). Forward mode, reverse
    mode and all higher derivatives are again linear scans. The only residuals are `decay` and the
    outputs.

    Args:
      decay: [B, T, D], or [T, D] or [D] where it is shared; real or complex. Magnitudes up to 1
        are safe in every algorithm. "sequential" also takes larger ones, as long as the states are
        finite. The other algorithms multiply decays of consecutive steps: up to T of them in
        "associative", and up to `chunk_size` in "chunked". `sequence_axis` multiplies the decays of
        one device, and the GPU kernel those of a part of T. These products must stay in the range
        of the state's dtype, in float32 1e-38 to 3e38. Beyond this range the result may be NaN, or
        a state may be lost, although the recurrence is finite. Underflow is safe unless later
        decays grow again.
      x: [B, T, D], real or complex.
      initial_state: [B, D], the final state of an earlier call; by default zeros.
      reset: [B, T] bool.
      reverse: run backwards in time.
      algorithm: "sequential" (step by step), "associative" (log depth, with temporaries of the
        size of `x`) or "chunked" (log depth inside chunks, which run one after the other). By
        default sequential when compiled for CPU or as a kernel. On GPU the default is associative
        while the states take at most 2 GiB, and chunked above. On other platforms it is
        associative up to T = 4096, and chunked above.
      implementation: "xla" or "pallas" (a sequential kernel for TPU and for GPU from Hopper on).
        By default the kernel runs on TPU and Hopper GPUs, if two conditions hold. It supports the
        dtypes (not float16, not float64), and the compiler need not partition it over devices, as
        inside a `jax.shard_map` over all mesh axes. On GPU, rows of D numbers must be multiples of
        16 bytes. On GPU the default is XLA for calls with `block_sizes`, and for long calls with
        few thread blocks (more than 1024 steps each in fewer than 44 blocks of 128 features).
      chunk_size: steps in a chunk of the chunked algorithm; by default 256.
      unroll: steps in an iteration of the sequential algorithm's loop; by default 4, and 1 in the
        backward pass.
      block_sizes: (steps, features) of a block of the kernel: steps a multiple of 16, features a
        multiple of 128 or D; on GPU 128. By default chosen by shape. The sizes have no effect where
        XLA runs the call by default, as on CPU. The compiler raises if a block exceeds its memory.
      interpret: run the TPU kernel in interpret mode, without a TPU. This is slow.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split. `initial_state`
        and the final state are then those of the whole sequence, the same on every device.

    Returns:
      (h [B, T, D], final state [B, D]). The first has the dtype of `x`. The second is float32 for
      float32 and narrower input, and float64 for float64. Both are complex if any input is.

    Raises:
      ValueError: if shapes, dtypes or block sizes do not fit, the algorithm is unknown, or
        `block_sizes` are combined with implementation="xla".
      NotImplementedError: if the implementation does not support the call or the platform, or
        `block_sizes` are given and the kernel does not support the call.

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
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("sequential", "associative", "chunked"), length=sizes["T"]
    )
    state, out = checks.state_dtype(*given.values()), checks.output_dtype(*given.values())
    h0 = given["initial_state"]
    h0 = jnp.zeros((sizes["B"], sizes["D"]), state) if h0 is None else h0.astype(state)
    decay = given["decay"].reshape((1,) * (3 - given["decay"].ndim) + given["decay"].shape)
    if block_sizes is not None:
        block_sizes = checks.check_block_sizes(op, block_sizes, "D", sizes["D"], unit=128)
    dtypes = {jnp.finfo(array.dtype).dtype for array in (decay, given["x"], h0)}
    backend = backends.select_backend(
        op,
        algorithm,
        implementation,
        interpret,
        length=sizes["T"],
        unsupported=unsupported(dtypes, interpret),
        excluded=() if _pays_off_on_gpu(sizes, dtypes) else ("hopper",),
        block_sizes=block_sizes,
    )
    options = ScanOptions(
        out, reverse=reverse, algorithm=algorithm, chunk_size=chunk_size, unroll=unroll
    )
    return _scan(
        decay,
        given["x"],
        h0,
        reset,
        options=options,
        backend=backend,
        sequence_axis=sequence_axis,
    )


def unsupported(dtypes: set[jnp.dtype], interpret: bool) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    refused = ("float16",) if interpret else ("float16", "float64")
    return backends.unsupported_dtype(dtypes, *refused)


def _pays_off_on_gpu(sizes: Mapping[str, Any], dtypes: set[jnp.dtype]) -> bool:
    """Return whether the GPU kernel supports rows of D numbers and is expected to be faster."""
    shape = sizes["B"], sizes["T"], sizes["D"]
    if not all(isinstance(size, int) for size in shape):  # symbolic
        return False
    itemsize = min(dtype.itemsize for dtype in dtypes)
    return whole_rows(sizes["D"], itemsize) and faster_on_gpu(*shape)


@functools.partial(jax.jit, static_argnames=("options", "backend", "sequence_axis"))
def _scan(
    a: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    options: ScanOptions,
    backend: backends.Backend,
    sequence_axis: str | None,
) -> tuple[Array, Array]:
    if sequence_axis is None:
        return scan(a, x, h0, reset, options, backend)
    a, x, h0, reset = jax_compat.match_varying(a, x, h0, reset)

    def shard(h0: Array, x: Array = x) -> tuple[Array, Array]:
        return scan(a, x, h0, reset, options, backend)

    _, transition = shard(jnp.ones_like(h0), jnp.zeros_like(x))
    return sequence_parallel.run_split(
        shard, transition, h0, reset, sequence_axis, reverse=options.reverse
    )
