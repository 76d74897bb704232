"""Differences between jax versions that the kernels depend on."""

import inspect
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["array_like", "gpu_interpreter", "gpu_load", "gpu_store", "pl", "pltpu"]


def array_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel output that varies over the same mesh axes as the operand `x`.

    `pallas_call` requires these axes inside `jax.shard_map` with varying-axes checks.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def gpu_interpreter() -> Any:
    """Return the interpreter that runs Mosaic GPU kernels on a CPU and raises on data races.

    Raises:
      NotImplementedError: if the jax version has no such interpreter.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:
        raise NotImplementedError(
            "interpret mode of GPU kernels: jax must be 0.11.2 or newer, got"
            f" {jax.__version__}; update jax, or leave interpret out."
        )
    return parameters(detect_races=True)


def gpu_load(ref: Any, layout: Any) -> jax.Array:
    """Read an array in shared memory into the registers of a warpgroup, in the given layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The check for bank conflicts does not support rows of odd length.
    indices = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *indices, layout=layout, optimized=False)


def gpu_store(ref: Any, value: jax.Array) -> None:
    """Write the registers of a warpgroup to global memory, also in parts of 32-byte sectors."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "store"):  # jax 0.12 refuses parts of sectors in assignments
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
