"""What the matrix-state ops do alike before they compute: checks, defaults, choice of algorithm."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops import _checks, _chunked, _dispatch

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


def call(
    op: str,
    run: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: Mapping[str, Any],
    *,
    complex_ok: bool,
    scale: Any,
    reset: Any,
    chunk_size: int | None,
    algorithm: str | None,
    implementation: str | None,
    sequence_axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Check the arguments of a public op and `run(*arrays, reset, scale, **static)` it.

    `arrays` are those of the op, in the order `run` takes them, `initial_state` last.
    """
    given = _checks.as_arrays(arrays)
    sizes = _checks.check_shapes(op, {name: PATTERNS[name] for name in given}, given)
    _checks.check_dtypes(op, given, complex_ok=complex_ok)
    reset = _checks.check_reset(op, reset, sizes["B"], sizes["T"])
    _checks.check_positive(op, chunk_size=chunk_size)
    algorithm = _dispatch.resolve(op, algorithm, implementation, algorithms=_chunked.ALGORITHMS)
    if given["initial_state"] is None:
        shape = (sizes["B"], sizes["H"], sizes["K"], sizes["V"])
        given["initial_state"] = jnp.zeros(shape, _checks.state_dtype(*given.values()))
    return run(
        *given.values(),
        reset,
        sizes["K"] ** -0.5 if scale is None else scale,
        algorithm=_chunked.choose(algorithm, sizes["T"]),
        chunk_size=chunk_size or 64,
        sequence_axis=sequence_axis,
    )
