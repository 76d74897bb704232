"""What the matrix-state ops do alike: all but their equation and its form in chunks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import chunk_steps
from seqjax.ops.core import (
    backends,
    checks,
    explicit_mesh,
    jax_compat,
    kernel_op,
    linalg,
    sequence_parallel,
)
from seqjax.ops.core.broadcast import along_rows
from seqjax.ops.core.checkpointed_scan import time_scan
from seqjax.ops.matrix_state import chunked, decays

ALGORITHMS = ("sequential", "chunked", "associative")
KERNEL_WIDTH = 256  # the largest K and V whose blocks fit the memory of every chip
PATTERNS = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
    "beta": "B T H",
    "log_decay": "B T H | B T H K",
    "initial_state": "B H K V",
}

auto_inside = explicit_mesh.auto_inside(explicit_mesh.by_axes(PATTERNS, "B T H V", "B H K V"))


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A recurrence S_t = f(S_{t-1}, D_t S_{t-1}, x_t), D_t = diag(exp g_t), and o_t = S_t^T q_t.

    Attributes:
      name: of the op.
      step: f, from S and D S [B, H, K, V] and the inputs of a step by name [B, H, features].
      prepare: chunks of it as affine maps of the state.
      complex_ok: whether arguments may be complex.
      diagonal: whether f adds to D S something that does not depend on S.
      reads: the inputs that read S_{t-1}, which a reset clears.
      cpu_chunks_from: the number of elements of a state from which chunks pay on a CPU: without
        decay, with one per head, and with decays per channel.
    """

    name: str
    step: Callable[[jax.Array, jax.Array, chunked.Arrays], jax.Array]
    prepare: chunked.Prepare
    cpu_chunks_from: tuple[int, int, int]
    complex_ok: bool = False
    diagonal: bool = False
    reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The algorithm on CPU and on other backends, the caller's chunk size, and for the kernel.

    `scale` is the default, K**-0.5, and None where the caller gives a scale. A given scale is an
    operand: a static one would compile the op again for every new number.
    """

    on_cpu: str
    elsewhere: str
    chunk_size: int | None
    use: backends.Use
    scale: float | None


def choose(
    recurrence: Recurrence, sizes: Mapping[str, int], log_decay: jax.Array | None
) -> tuple[str, str]:
    """The algorithms on CPU and elsewhere, for T steps of B x H states of K x V elements.

    On a CPU, a step on a small state costs little more than a kernel call, and small matmuls run
    far below their peak: what a state must hold for chunks to pay depends on how many matmuls
    a chunk takes, and a chunk of a few steps takes few. Where all states together are few, the
    kernel calls that a chunk saves are all that counts, unless its decays take many themselves.
    Where chunks do little each, as the small ones of a diagonal recurrence, many at once are the
    faster. All with gradients; only forward, steps stay the faster for longer (`experiments.bench
    choice`). Elsewhere steps wait for each other and matmuls are what the machine is made for, but
    for a handful of steps; not measured there.
    """
    # Symbolic sizes, under `jax.export`, count as large ones.
    batch, length = (size if isinstance(size, int) else 2**31 for size in (sizes["B"], sizes["T"]))
    elements = sizes["K"] * sizes["V"]
    together = batch * sizes["H"] * elements
    axes = 0 if log_decay is None else log_decay.ndim - 2
    light = recurrence.diagonal or axes == 0
    if length < 16:
        pays = length >= 4 and elements >= 4096 and (recurrence.diagonal or together >= 2**17)
    else:
        pays = elements >= recurrence.cpu_chunks_from[axes] and length * elements >= 8192
        pays |= together <= 1024 and light and (axes < 2 or length <= 64)
    if not pays:
        on_cpu = "sequential"
    else:
        many = recurrence.diagonal and elements <= 1024 and length >= 256
        many &= isinstance(sizes["T"], int)
        on_cpu = "associative" if many else "chunked"
    return on_cpu, "sequential" if length < 8 else "chunked"


def call(
    recurrence: Recurrence,
    arrays: Mapping[str, Any],
    *,
    scale: Any,
    reset: Any,
    chunk_size: int | None,
    algorithm: str | None,
    implementation: str | None,
    sequence_axis: str | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Check the arguments of a public op and run it; `arrays` by the names in `PATTERNS`."""
    op = recurrence.name
    given = checks.as_arrays(arrays)
    sizes = checks.check_shapes(op, {name: PATTERNS[name] for name in given}, given)
    checks.check_dtypes(op, given, complex_ok=recurrence.complex_ok)
    reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
    checks.check_sequence_axis(op, sequence_axis)
    checks.check_positive(op, chunk_size=chunk_size)
    algorithm = backends.resolve(
        op,
        algorithm,
        implementation,
        algorithms=ALGORITHMS,
        length=sizes["T"],
        any_length=("sequential", "chunked"),
    )
    if given["initial_state"] is None:
        shape = (sizes["B"], sizes["H"], sizes["K"], sizes["V"])
        given["initial_state"] = jnp.zeros(shape, checks.state_dtype(*given.values()))
    chosen = choose(recurrence, sizes, given["log_decay"])
    use = backends.kernel_use(
        op,
        algorithm,
        implementation,
        interpret,
        lacking=_lacking(given, interpret),
        faster=backends.long_enough(sizes["T"]),  # most of a chunk would be empty
    )
    scale = checks.check_scale(op, scale)
    default = sizes["K"] ** -0.5 if scale is None else None
    plan = Plan(*((algorithm, algorithm) if algorithm else chosen), chunk_size, use, default)
    return _run(given, reset, scale, recurrence=recurrence, plan=plan, sequence_axis=sequence_axis)


@functools.partial(jax.jit, static_argnames=("recurrence", "plan", "sequence_axis"))
def _run(
    given: dict[str, jax.Array | None],
    reset: jax.Array | None,
    scale: jax.Array | None,
    *,
    recurrence: Recurrence,
    plan: Plan,
    sequence_axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    names = list(given)
    *values, reset, scale = jax_compat.match_varying(*given.values(), reset, scale)
    arrays = dict(zip(names, values, strict=True))
    state, out = checks.state_dtype(*values), checks.output_dtype(arrays["v"], *values)
    S0, log_decay = arrays.pop("initial_state").astype(state), arrays.pop("log_decay")
    scale = None if scale is None else scale.astype(jnp.finfo(state).dtype)

    def xla(
        arrays: Any, log_decay: Any, S0: jax.Array, reset: Any, scale: Any
    ) -> tuple[jax.Array, jax.Array]:
        arrays = {name: x if x.ndim == 4 else x[..., None] for name, x in arrays.items()}
        factor = jnp.asarray(plan.scale if scale is None else scale, state)
        arrays["q"] = arrays["q"].astype(state) * factor
        if reset is not None:  # a cleared state is not read either
            for name in recurrence.reads:
                x = arrays[name]
                arrays[name] = jnp.where(reset[..., None, None], jnp.zeros_like(x), x)

        def step(S: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
            x, decay, cut = inputs
            x = {name: value.astype(state) for name, value in x.items()}
            if cut is not None:
                S = jnp.where(cut[:, None, None, None], jnp.zeros_like(S), S)
            decayed = S if decay is None else along_rows(decay, S.shape[-1]) * S
            S = recurrence.step(S, decayed, x)
            return S, linalg.read(S, x["q"]).astype(out)

        def by(algorithm: str, S0: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
            if algorithm == "sequential":
                decay = decays.by_step(log_decay, inputs["q"])
                # The adjoint keeps the states of a chunk at hand: few enough for a cache.
                return time_scan(step, S0, (inputs, decay, reset), plan.chunk_size or 16)
            if log_decay is not None:
                inputs = inputs | {"g": log_decay if log_decay.ndim == 4 else log_decay[..., None]}
            return chunked.scan_chunks(
                recurrence.prepare,
                inputs,
                S0,
                reset,
                out_dtype=out,
                chunk_size=plan.chunk_size or 64,
                log_depth=algorithm == "associative",
            )

        return backends.by_platform(by, plan.on_cpu, plan.elsewhere, S0, arrays)

    run = kernel_op.kernel_op(plan.use, xla, *_as_kernels(plan))

    def local(S0: jax.Array, v: jax.Array = arrays["v"]) -> tuple[jax.Array, jax.Array]:
        return run(arrays | {"v": v}, log_decay, S0, reset, scale)

    if sequence_axis is None:
        return local(S0)
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    if not recurrence.diagonal:
        # What becomes of the identity when nothing is written.
        size = S0.shape[-2]
        identity = jnp.eye(size, dtype=state) + jnp.zeros_like(S0[..., :1])
        nothing = jnp.zeros_like(arrays["v"], shape=(*arrays["v"].shape[:-1], size))
        transition, apply = local(identity, nothing)[1], linalg.matmul
    else:
        transition, apply = decays.of_part(log_decay, S0, reset), jnp.multiply
    return sequence_parallel.run_split(local, transition, S0, reset, sequence_axis, apply=apply)


def _lacking(given: Mapping[str, Any], interpret: bool) -> str | None:
    """What the kernels cannot do of this call."""
    dtypes = {x.dtype for x in given.values() if x is not None}
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "has no complex form"
    if jnp.dtype(jnp.float16) in dtypes:
        return "takes no float16; cast to bfloat16 or float32"
    if jnp.dtype(jnp.float64) in dtypes and not interpret:
        return "takes no float64, which TPUs do not have"
    if (unsupported := backends.unsupported_length(given["q"].shape[1])) is not None:
        return unsupported
    widest = max(given["k"].shape[-1], given["v"].shape[-1])
    if widest > KERNEL_WIDTH:
        return f"takes keys and values of at most {KERNEL_WIDTH} numbers, these have {widest}"
    return None


def _as_kernels(plan: Plan) -> tuple[Callable[..., Any], ...]:
    """The kernels as `kernel_op.kernel_op` wants them: forward, backward and what is saved."""
    # A kernel is compiled with the default scale; a given one multiplies the queries before it.
    shared = {
        "scale": 1.0 if plan.scale is None else plan.scale,
        "chunk_size": plan.chunk_size,
        "interpret": plan.use.interpret,
    }

    def inputs(arrays: Any, log_decay: Any, scale: Any) -> tuple[Any, ...]:
        q = arrays["q"]
        if scale is not None:
            q = (q.astype(scale.dtype) * scale).astype(q.dtype)
        return q, arrays["k"], arrays["v"], arrays.get("beta"), log_decay

    def forward(
        kernels: Any, arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any, *, save: bool
    ) -> Any:
        out, final, *states = kernels.forward(
            *inputs(arrays, log_decay, scale), S0, reset, states=save, **shared
        )
        return (out, final), states

    def backward(
        kernels: Any, args: Any, outputs: Any, kept: Any, cotangents: Any
    ) -> list[jax.Array]:
        del outputs
        arrays, log_decay, _, reset, scale = args
        [states] = kept
        found = kernels.backward(
            *inputs(arrays, log_decay, scale), states, reset, *cotangents, **shared
        )
        by_scale = []
        if scale is not None:
            q, d_scaled = arrays["q"], found["q"].astype(scale.dtype)
            by_scale = [jnp.sum(d_scaled * q.astype(scale.dtype))]
            found |= {"q": (d_scaled * scale).astype(q.dtype)}
        last = [] if log_decay is None else [found["log_decay"]]
        return [*(found[name] for name in sorted(arrays)), *last, found["initial_state"], *by_scale]

    def saved(
        arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any
    ) -> list[jax.ShapeDtypeStruct]:
        del reset
        steps = chunk_steps(*inputs(arrays, log_decay, scale), wanted=plan.chunk_size)
        count = -(-arrays["q"].shape[1] // steps)
        batch, *rest = S0.shape
        return [jax.ShapeDtypeStruct((batch, count, *rest), S0.dtype)]

    return forward, backward, saved
