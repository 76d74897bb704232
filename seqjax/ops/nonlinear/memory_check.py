"""Check of the memory that the Jacobians of Newton's method and of its derivatives take."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax


def device_memory() -> int | None:
    """Return the bytes of memory of the devices that may share an array; None if unknown.

    An array may be split over all devices. Inside `jax.shard_map` it is the part of one device, or
    of the devices along the axes of the mesh that are not manual.
    """
    memory = _memory_of_one()
    mesh = jax.sharding.get_abstract_mesh()
    count = jax.device_count()
    if mesh.manual_axes:
        count = math.prod(n for name, n in mesh.shape.items() if name not in mesh.manual_axes)
    return None if memory is None else memory * count


def _memory_of_one() -> int | None:
    """Return the bytes of memory of the smallest device of this process; None if unknown."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":  # all of them share the memory of the host
        if not hasattr(os, "sysconf"):
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    try:
        return min((device.memory_stats() or {})["bytes_limit"] for device in devices)
    except (KeyError, jax.errors.JaxRuntimeError):  # the platform has no statistics
        return None


def check_memory(
    op: str, structure: str, sizes: Sequence[Any], itemsize: int, fraction: float
) -> None:
    """Raise if Jacobians would take more than a fraction of the devices' memory.

    Args:
      op: the name of the op.
      structure: the structure of a Jacobian.
      sizes: the batch size, the steps whose Jacobians are stored, and the axes of a state.
      itemsize: bytes of a number.
      fraction: the largest part of the memory.
    """
    memory = device_memory()
    if memory is None or not all(isinstance(size, int) for size in sizes):
        return
    batch, length, *state = sizes
    # "quasi" takes the diagonal of a dense Jacobian.
    columns = {"diagonal": 1, "block": state[-1]}.get(structure, math.prod(state))
    needed = batch * length * math.prod(state) * columns * itemsize
    if needed > fraction * memory:
        raise ValueError(
            f"{op}: Jacobians of {length} steps must take at most {fraction:.0%} of"
            f" {memory / 1e9:.3g} GB of device memory, got {needed / 1e9:.3g} GB; use"
            " algorithm='sequential', or allow more with solver=Newton(memory_fraction=...)."
        )
