"""The one seam between ops and what runs them.

Two separate choices: `algorithm` (what is computed in which order) and `implementation` (who
runs it). A named choice is honoured or refused, never replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

IMPLEMENTATIONS = ("xla", "pallas")

# The ops that have a Pallas kernel; a kernel that lands adds its op.
KERNELS: frozenset[str] = frozenset()


def resolve(
    op: str,
    algorithm: str | None,
    implementation: str | None,
    *,
    algorithms: Sequence[str],
) -> str | None:
    """Check the two keywords and return the algorithm to run (None: the op chooses).

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
    if implementation == "pallas" and op not in KERNELS:
        raise NotImplementedError(
            f"{op}: there is no Pallas kernel for this op yet; use implementation='xla' or None."
        )
    return algorithm


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
