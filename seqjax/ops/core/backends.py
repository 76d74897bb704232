"""The one seam between ops and what runs them.

Two separate choices: `algorithm` (what is computed in which order) and `implementation` (who
runs it). A named choice is honoured or refused, never replaced.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from seqjax.ops.core import jax_compat

IMPLEMENTATIONS = ("xla", "pallas")


class Kernel(NamedTuple):
    """What there is to run an op besides XLA.

    Attributes:
      algorithm: that it follows.
      platforms: that it is for; the first is that whose kernel is interpreted.
      preferred: the platforms where it is the default; elsewhere it has to be named. "hopper" is
        CUDA on GPUs of compute capability 9.
    """

    algorithm: str
    platforms: tuple[str, ...] = ("tpu",)
    preferred: tuple[str, ...] = ("tpu",)


# The ops that have a Pallas kernel; a kernel that lands adds its op.
KERNELS = {
    "delta_rule": Kernel("chunked"),
    "linear_attention": Kernel("chunked"),
    "linear_scan": Kernel("sequential", ("tpu", "cuda"), preferred=("tpu", "hopper")),
    "nonlinear_scan": Kernel("sequential", platforms=("cuda",), preferred=()),
    "selective_scan": Kernel("sequential", ("tpu", "cuda"), preferred=("tpu", "hopper")),
}
FILES = {"tpu": "tpu", "cuda": "gpu"}  # of a platform's kernels, in `pallas_kernels.<op>`


class Use(NamedTuple):
    """How a call uses its op's kernel.

    Attributes:
      op: its name.
      mode: "never"; "may", where the program is compiled for a platform that prefers it; "must",
        and compiling for a platform without it is refused; "interpret", on any platform, slowly.
      excluded: platforms whose kernel "may" leaves out, because it does not support the call or
        is slower.
    """

    op: str
    mode: str = "never"
    excluded: tuple[str, ...] = ()

    @property
    def never(self) -> bool:
        """Whether only XLA can run this call."""
        return self.mode == "never"

    @property
    def always(self) -> bool:
        """Whether only the kernel can run this call."""
        return self.mode in ("must", "interpret")

    @property
    def interpret(self) -> bool:
        """Whether the kernel is interpreted."""
        return self.mode == "interpret"

    def on(self, target: jax_compat.Target, *operands: jax.Array) -> bool:
        """Whether the kernel runs these operands where the program is compiled for.

        Raises:
          NotImplementedError: if it must and cannot.
        """
        if self.never or self.interpret:
            return self.interpret
        kernel = KERNELS[self.op]
        if self.mode == "may":
            preferred = target.name in kernel.preferred and target.platform not in self.excluded
            return preferred and not target.partitioned
        if target.platform not in kernel.platforms:
            raise NotImplementedError(
                f"{self.op}: there is no Pallas kernel for {target.platform}; use "
                "implementation='xla' or None, or interpret=True to try the kernel there."
            )
        if target.capability is not None and target.capability < (9, 0):
            major, minor = target.capability
            raise NotImplementedError(
                f"{self.op}: the Pallas kernel for GPU must have compute capability 9.0 (Hopper) "
                f"or newer, got {major}.{minor}; use implementation='xla' or None."
            )
        sizes = [size for x in operands for size in x.shape if not isinstance(size, int)]
        if target.platform == "cuda" and sizes:
            raise NotImplementedError(
                f"{self.op}: the Pallas kernel for GPU must have sizes that are known at trace"
                f" time, got the symbolic size {sizes[0]}; use implementation='xla' or None."
            )
        if target.partitioned:
            raise NotImplementedError(_split(self.op))
        return True

    @property
    def by_tpu(self) -> bool:
        """Whether the kernel that is interpreted is that for TPU."""
        return KERNELS[self.op].platforms[0] == "tpu"

    def kernels(self, target: jax_compat.Target | None) -> Any:
        """The module of `pallas_kernels` that runs it there; interpreted the first there is.

        Imported where it is run: half a second that programs for a CPU need not spend.
        """
        if self.interpret or target is None:
            platform = KERNELS[self.op].platforms[0]
        else:
            platform = target.platform
        return importlib.import_module(f"pallas_kernels.{self.op}.{FILES[platform]}")


def resolve(
    op: str,
    algorithm: str | None,
    implementation: str | None,
    *,
    algorithms: Sequence[str],
    length: Any,
    any_length: Sequence[str] = ("sequential",),
) -> str | None:
    """Check the two keywords and return the algorithm to run (None: the op chooses).

    Args:
      op: its name.
      algorithm: as the caller named it.
      implementation: as the caller named it.
      algorithms: those of the op.
      length: T, a number, or a symbol under `jax.export`.
      any_length: the algorithms that run with a symbolic T.

    Raises:
      ValueError: for a name that does not exist.
      NotImplementedError: for a choice that exists but cannot run.
    """
    known = ("sequential", "associative", "chunked", "newton")
    if algorithm is not None and algorithm not in known:
        raise ValueError(
            f"{op}: `algorithm` must be one of {', '.join(algorithms)} or None, got {algorithm!r}."
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: `implementation` must be 'xla', 'pallas' or None, got {implementation!r}."
        )
    if algorithm is not None and algorithm not in algorithms:
        raise NotImplementedError(
            f"{op}: there is no {algorithm!r} algorithm for this op; use {' or '.join(algorithms)}."
        )
    if not isinstance(length, int) and algorithm not in (None, *any_length):
        raise NotImplementedError(
            f"{op}: the {algorithm!r} algorithm must have a T that is known at trace time, got the"
            f" symbolic T={length}; use algorithm={any_length[0]!r} or None, or export with a fixed"
            " T."
        )
    if implementation == "pallas":
        _check_kernel(op, algorithm)
    return algorithm


def long_enough(length: Any) -> bool:
    """Return whether a kernel or a chunk pays for T steps; not for a symbolic T."""
    return isinstance(length, int) and length >= 8


def unsupported_length(length: Any) -> str | None:
    """Return what a kernel cannot do with a symbolic T, or None for a known one."""
    if isinstance(length, int):
        return None
    return f"must have a T that is known at trace time, got the symbolic T={length}"


def _check_kernel(op: str, algorithm: str | None) -> None:
    if op not in KERNELS:
        raise NotImplementedError(
            f"{op}: there is no Pallas kernel for this op yet; use implementation='xla' or None."
        )
    if algorithm not in (None, KERNELS[op].algorithm):
        raise NotImplementedError(
            f"{op}: the Pallas kernel is {KERNELS[op].algorithm}, not {algorithm}; use "
            f"algorithm={KERNELS[op].algorithm!r} or None, or implementation='xla'."
        )


def _split(op: str) -> str:
    return (
        f"{op}: a Pallas kernel cannot be split over devices by the compiler; call it inside "
        "jax.shard_map, or use implementation='xla' or None."
    )


def kernel_use(
    op: str,
    algorithm: str | None,
    implementation: str | None,
    interpret: bool,
    *,
    lacking: str | None = None,
    faster: bool = True,
    excluded: tuple[str, ...] = (),
) -> Use:
    """How a call whose names `resolve` has checked uses the kernel of its op.

    Args:
      op: its name.
      algorithm: as the caller named it.
      implementation: as the caller named it.
      interpret: as the caller gave it.
      lacking: what the kernel cannot do of this call ("takes no float16"), None if it can do all.
      faster: whether the kernel is the default for these shapes.
      excluded: platforms on which it is not the default for this call.

    Raises:
      ValueError: for `interpret` without a kernel to interpret.
      NotImplementedError: for a kernel that was asked for and cannot run.
    """
    if implementation == "xla":
        if interpret:
            raise ValueError(
                f"{op}: `interpret` runs the Pallas kernel without its hardware, "
                "implementation='xla' asks for another; leave one of them out."
            )
        return Use(op)
    asked = interpret or implementation == "pallas"
    if asked:
        _check_kernel(op, algorithm)
        if lacking is not None:
            raise NotImplementedError(
                f"{op}: the Pallas kernel {lacking}; use implementation='xla' or None."
            )
        if not interpret and jax_compat.is_split_by_compiler():
            raise NotImplementedError(_split(op))
        return Use(op, "interpret" if interpret else "must")
    if op not in KERNELS or not KERNELS[op].preferred or lacking is not None or not faster:
        return Use(op)
    if algorithm not in (None, KERNELS[op].algorithm):
        return Use(op)
    return Use(op, "may", excluded)


def by_platform(run: Callable[..., Any], on_cpu: str, elsewhere: str, *operands: jax.Array) -> Any:
    """`run(algorithm, *operands)`, with the algorithm for the platform that is compiled for.

    Which one that is, is known when the program is lowered and not before: under ahead-of-time
    compilation it is not the one of the machine at hand.
    """
    if on_cpu == elsewhere:
        return run(on_cpu, *operands)
    return lax.platform_dependent(
        *operands,
        cpu=lambda *operands: run(on_cpu, *operands),
        default=lambda *operands: run(elsewhere, *operands),
    )
