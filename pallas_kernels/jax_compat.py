"""What the kernels need of jax that differs between its versions or may still move."""

import inspect
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["array_like", "gpu_interpreter", "gpu_load", "pl", "pltpu"]


def array_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output of a kernel, which varies over the same mesh axes as its operand `x`.

    Inside `jax.shard_map` with varying-axes checks `pallas_call` wants that stated.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def gpu_interpreter() -> Any:
    """What runs a Mosaic GPU kernel on a CPU, and raises if its copies and accesses race.

    Raises:
      NotImplementedError: where jax has nothing that does.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    made = getattr(plgpu, "InterpretGPUParams", None)
    if made is None:
        raise NotImplementedError(
            f"jax {jax.__version__} cannot interpret a kernel for GPU; 0.11.2 and newer can."
        )
    return made(detect_races=True)


def gpu_load(ref: Any, layout: Any) -> jax.Array:
    """What is in shared memory, spread over the threads of a warpgroup as the layout says."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The check that it is read without bank conflicts cannot follow rows of odd length.
    indices = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *indices, layout=layout, optimized=False)
