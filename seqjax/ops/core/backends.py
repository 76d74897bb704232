"""Backend selection for ops.

A call has two independent options: `algorithm` (the order of computation) and `implementation` (XLA
or a Pallas kernel). An explicit choice is honored or raises. By default the backend is the fastest
measured one for the platform that the program is compiled for.

`select_algorithm` and `select_backend` check the caller's choice when the op is called.
`runs_kernel` decides when the program is lowered, because the platform is unknown before.
"""

import contextlib
import enum
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from seqjax.ops.core import jax_compat

ALGORITHMS = ("sequential", "associative", "chunked", "newton")
IMPLEMENTATIONS = ("xla", "pallas")


class Kernels(NamedTuple):
    """The Pallas kernels of an op.

    Attributes:
      algorithm: the algorithm of the kernels.
      modules: module of `pallas_kernels.<op>` for each platform. Interpret mode uses the first one.
      preferred: the targets on which the kernel is the default. "hopper" is CUDA on GPUs of compute
        capability 9.
      sized: the platforms whose kernel takes `block_sizes`.
    """

    algorithm: str
    modules: dict[str, str]
    preferred: tuple[str, ...]
    sized: tuple[str, ...] = ("tpu",)


BACKENDS: dict[str, Kernels | None] = {
    "block_scan": None,
    "delta_rule": Kernels("chunked", {"tpu": "tpu", "cuda": "gpu"}, ("tpu",)),
    "generalized_delta_rule": Kernels("chunked", {"tpu": "tpu", "cuda": "gpu"}, ("tpu",)),
    "linear_attention": Kernels("chunked", {"tpu": "tpu", "cuda": "gpu"}, ("tpu",)),
    "linear_scan": Kernels(
        "sequential", {"tpu": "tpu", "cuda": "gpu"}, ("tpu", "hopper"), sized=("tpu", "cuda")
    ),
    "log_scan": None,
    "momentum_delta_rule": None,
    "monoid_scan": None,
    "nonlinear_scan": Kernels("sequential", {"cuda": "gpu", "tpu": "tpu"}, (), sized=()),
    "selective_scan": Kernels("sequential", {"tpu": "tpu", "cuda": "gpu"}, ("tpu", "hopper")),
    "step_scan": None,
    "ssm_scan": None,
}


# Part of the key of JAX's caches, so a function that was compiled outside is compiled again inside.
_default_implementation = jax.make_user_context(default_value=None)


def default_implementation(implementation: str | None) -> contextlib.AbstractContextManager[None]:
    """Set the backend of all calls that do not choose one, within a `with` block.

    Ops take `implementation` as an argument, and most layers do not. Inside the block, a call with
    `implementation=None` uses the value given here. Compiled functions are compiled again inside.

    Args:
      implementation: "xla", so that no Pallas kernel runs, or None, the automatic choice.

    Returns:
      a context manager.

    Raises:
      ValueError: if the value is another one.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> layer = seqjax.layers.DeltaNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> with seqjax.default_implementation("xla"):
      ...     y, state = jax.jit(layer.apply)(params, jnp.ones((1, 16, 8)))
      >>> y.shape
      (1, 16, 8)
    """
    if implementation not in (None, "xla"):
        raise ValueError(
            "default_implementation: `implementation` must be 'xla' or None, got"
            f" {implementation!r}; pass implementation='pallas' to the op itself."
        )
    return _default_implementation(implementation)


class Mode(enum.Enum):
    """Use of the op's Pallas kernel in a call.

    OFF: XLA runs the call.
    AUTO: the kernel runs on the platforms that prefer it, XLA elsewhere.
    REQUIRED: the kernel runs. Compiling for a platform without the kernel raises.
    INTERPRET: the kernel is interpreted, slowly, on any platform.
    """

    OFF = enum.auto()
    AUTO = enum.auto()
    REQUIRED = enum.auto()
    INTERPRET = enum.auto()


KERNEL_ONLY = (Mode.REQUIRED, Mode.INTERPRET)


class Backend(NamedTuple):
    """The backend of a call.

    Attributes:
      op: the name of the op.
      mode: how the call uses the kernel of the op.
      preferred: the targets on which `Mode.AUTO` runs the kernel.
      refused: platforms whose kernel does not support the call, each with the reason.
      block_sizes: the caller's choice for the kernel, or None.
    """

    op: str
    mode: Mode = Mode.OFF
    preferred: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    block_sizes: tuple[int, int] | None = None

    @property
    def interpret(self) -> bool:
        """True if the kernel is interpreted."""
        return self.mode is Mode.INTERPRET

    @property
    def modules(self) -> dict[str, str]:
        """The modules of the kernel by platform."""
        kernels = BACKENDS[self.op]
        if kernels is None:
            return {}
        refused = dict(self.refused)
        return {p: module for p, module in kernels.modules.items() if p not in refused}

    @property
    def interpreted(self) -> str:
        """The platform whose kernel runs in interpret mode."""
        return next(iter(self.modules))

    def kernels(self, target: jax_compat.Target | None = None) -> Any:
        """Import the module of `pallas_kernels` for the target, or the one for interpret mode.

        The import takes half a second, which programs for CPU do not need.
        """
        platform = self.interpreted if self.interpret or target is None else target.platform
        return importlib.import_module(f"pallas_kernels.{self.op}.{self.modules[platform]}")


def runs_kernel(backend: Backend, target: jax_compat.Target, *operands: jax.Array) -> bool:
    """Return whether the kernel runs a call in a program that is compiled for `target`.

    Raises:
      NotImplementedError: if the mode is REQUIRED and the kernel does not support the target.
    """
    if backend.mode in (Mode.OFF, Mode.INTERPRET):
        return backend.interpret
    if backend.mode is Mode.AUTO:
        return target.name in backend.preferred and not target.partitioned
    if reason := _unsupported_target(backend, target, operands):
        raise NotImplementedError(f"{backend.op}: {reason}")
    return True


def _unsupported_target(
    backend: Backend, target: jax_compat.Target, operands: Sequence[jax.Array]
) -> str | None:
    """Return the reason why the kernel does not support a target, or None."""
    if target.platform not in backend.modules:
        if reason := dict(backend.refused).get(target.platform):
            return (
                f"the Pallas kernel for {target.platform} {reason}; use implementation='xla' or"
                " None."
            )
        return (
            f"there is no Pallas kernel for {target.platform}; use implementation='xla' or None, or"
            " interpret=True to try the kernel there."
        )
    if target.capability is not None and target.capability < (9, 0):
        major, minor = target.capability
        return (
            "the Pallas kernel for GPU must have compute capability 9.0 (Hopper) or newer, got"
            f" {major}.{minor}; use implementation='xla' or None."
        )
    symbolic = [size for x in operands for size in x.shape if not isinstance(size, int)]
    if target.platform == "cuda" and symbolic:
        return (
            "the Pallas kernel for GPU must have sizes that are known at trace time, got the"
            f" symbolic size {symbolic[0]}; use implementation='xla' or None."
        )
    kernels = BACKENDS[backend.op]
    if backend.block_sizes is not None and kernels and target.platform not in kernels.sized:
        return (
            "`block_sizes` must be None on GPU, where the blocks of this kernel are fixed, got"
            f" {backend.block_sizes}; leave it out."
        )
    return SPLIT if target.partitioned else None


SPLIT = (
    "a Pallas kernel cannot be split over devices by the compiler; call it inside jax.shard_map, or"
    " use implementation='xla' or None."
)


def select_algorithm(
    op: str,
    algorithm: str | None,
    *,
    algorithms: Sequence[str],
    length: Any,
    any_length: Sequence[str] = ("sequential",),
) -> str | None:
    """Check the caller's `algorithm` and return it, or None to let the op choose.

    Args:
      op: the name of the op.
      algorithm: the caller's choice.
      algorithms: the algorithms of the op.
      length: T, a number, or a symbol under `jax.export`.
      any_length: the algorithms that run with a symbolic T.

    Raises:
      ValueError: if the name is unknown.
      NotImplementedError: if the op does not have the algorithm, or it does not support the length.
    """
    if algorithm is None:
        return None
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{op}: `algorithm` must be one of {', '.join(algorithms)} or None, got {algorithm!r}."
        )
    if algorithm not in algorithms:
        raise NotImplementedError(
            f"{op}: there is no {algorithm!r} algorithm for this op; use {' or '.join(algorithms)}."
        )
    if not isinstance(length, int) and algorithm not in any_length:
        raise NotImplementedError(
            f"{op}: the {algorithm!r} algorithm must have a T that is known at trace time, got the"
            f" symbolic T={length}; use algorithm={any_length[0]!r} or None, or export with a fixed"
            " T."
        )
    return algorithm


def select_backend(
    op: str,
    algorithm: str | None,
    implementation: str | None,
    interpret: bool = False,
    *,
    length: Any,
    unsupported: str | None = None,
    excluded: Sequence[str] = (),
    refused: tuple[tuple[str, str], ...] = (),
    block_sizes: tuple[int, int] | None = None,
) -> Backend:
    """Check the caller's `implementation` and return the backend of the call.

    Args:
      op: the name of the op.
      algorithm: the caller's choice, checked by `select_algorithm`.
      implementation: the caller's choice.
      interpret: the caller's choice.
      unsupported: the reason why the kernel does not support this call, or None.
      length: T. A kernel needs a known T, and is the default from 8 steps on.
      excluded: targets on which the kernel is not the default for this call, such as "hopper".
      refused: platforms whose kernel does not support the call, each with the reason.
      block_sizes: the caller's choice for the kernel, checked by the op. They are for TPU, and on
        GPU they raise. So the kernel for GPU is not the default with them.

    Raises:
      ValueError: if a name is unknown, or an option of the kernel is combined with
        implementation="xla".
      NotImplementedError: if the kernel was chosen explicitly, or `block_sizes` are given, and the
        kernel does not support the call.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: `implementation` must be 'xla', 'pallas' or None, got {implementation!r}."
        )
    options = {"interpret": interpret, "block_sizes": block_sizes is not None}
    if implementation == "xla" and (option := next((o for o in options if options[o]), None)):
        raise ValueError(
            f"{op}: `{option}` is for the Pallas kernel, and must not be combined with"
            " implementation='xla'; leave one of them out."
        )
    kernels = BACKENDS.get(op)
    if implementation is None and not interpret:
        implementation = _default_implementation.value
    if implementation == "xla":
        return Backend(op)
    if not isinstance(length, int):
        unsupported = f"must have a T that is known at trace time, got the symbolic T={length}"
    required = interpret or implementation == "pallas"
    if required or block_sizes is not None:
        hint = "use implementation='xla' or None" if required else "leave out `block_sizes`"
        if kernels is None:
            raise NotImplementedError(f"{op}: there is no Pallas kernel for this op yet; {hint}.")
        if algorithm not in (None, kernels.algorithm):
            raise NotImplementedError(
                f"{op}: the Pallas kernel is {kernels.algorithm}, not {algorithm}; use "
                f"algorithm={kernels.algorithm!r} or None, or "
                + ("implementation='xla'." if required else f"{hint}.")
            )
        if unsupported is not None:
            raise NotImplementedError(f"{op}: the Pallas kernel {unsupported}; {hint}.")
    if required:
        if not interpret and jax_compat.is_split_by_compiler():
            raise NotImplementedError(f"{op}: {SPLIT}")
        mode = Mode.INTERPRET if interpret else Mode.REQUIRED
        return Backend(op, mode, refused=refused, block_sizes=block_sizes)
    if kernels is None or unsupported is not None or not pays_off(length):
        return Backend(op)
    if block_sizes is not None:
        excluded = (*excluded, "hopper")
    preferred = tuple(target for target in kernels.preferred if target not in excluded)
    if not preferred or algorithm not in (None, kernels.algorithm):
        return Backend(op)
    return Backend(op, Mode.AUTO, preferred, refused, block_sizes)


def unsupported_dtype(dtypes: Iterable[Any], *refused: str) -> str | None:
    """Return the reason why a kernel does not support these dtypes, or None.

    Args:
      dtypes: the dtypes of the arguments.
      *refused: the names of the dtypes that the kernel does not support.
    """
    found = sorted({str(dtype) for dtype in dtypes} & set(refused))
    return f"does not support {found[0]} arrays" if found else None


def pays_off(length: Any) -> bool:
    """Return whether T steps are worth a kernel launch or a chunk; False for a symbolic T."""
    return isinstance(length, int) and length >= 8


def by_platform(run: Callable[..., Any], on_cpu: Any, elsewhere: Any, *operands: Any) -> Any:
    """Return `run(choice, *operands)` with the choice for the platform of the program.

    The platform is known when the program is lowered, so both branches are traced here if the
    choices differ.
    """
    if on_cpu == elsewhere:
        return run(on_cpu, *operands)
    return lax.platform_dependent(
        *operands,
        cpu=lambda *operands: run(on_cpu, *operands),
        default=lambda *operands: run(elsewhere, *operands),
    )
