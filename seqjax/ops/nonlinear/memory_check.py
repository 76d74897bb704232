"""Check of the memory that Newton's method takes for dense Jacobians."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax


def device_memory() -> int | None:
    """Return the bytes of memory of all default devices together; None if unknown."""
    devices = jax.devices()
    if devices[0].platform == "cpu":  # all of them share the memory of the host
        if not hasattr(os, "sysconf"):
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit * len(devices)


def check_memory(op: str, sizes: Sequence[Any], itemsize: int, fraction: float) -> None:
    """Raise if dense Jacobians would take more than a fraction of the devices' memory.

    Args:
      op: the name of the op.
      sizes: the batch size, the steps of a Newton step, and the axes of a state.
      itemsize: bytes of a number.
      fraction: the largest part of the memory.
    """
    memory = device_memory()
    if memory is None or not all(isinstance(size, int) for size in sizes):
        return
    batch, length, *state = sizes
    needed = batch * length * math.prod(state) ** 2 * itemsize
    if needed > fraction * memory:
        raise ValueError(
            f"{op}: dense Jacobians must take at most {fraction:.0%} of {memory / 1e9:.3g} GB of"
            f" device memory, got {needed / 1e9:.3g} GB; use algorithm='sequential', or allow more"
            " with solver=Newton(memory_fraction=...)."
        )
