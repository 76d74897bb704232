"""What the kernels need of jax that differs between its versions or may still move."""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["array_like", "pl", "pltpu"]


def array_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output of a kernel, which varies over the same mesh axes as its operand `x`.

    Inside `jax.shard_map` with varying-axes checks `pallas_call` wants that stated.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
