"""The one seam between ops and what runs them.

Two separate choices: `algorithm` (what is computed in which order) and `implementation` (who
runs it). A named choice is honoured or refused, never replaced.
"""

from collections.abc import Sequence

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
