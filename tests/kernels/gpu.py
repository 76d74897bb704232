"""Shared tools of the tests of GPU kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

KERNEL = "custom_call @mosaic_gpu"
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # those of the contract
interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax cannot interpret Mosaic GPU"
)


def parts(array, dtype):
    """Convert an array to the kernel's layout."""
    if np.iscomplexobj(array):
        return jnp.asarray(array.real, dtype), jnp.asarray(array.imag, dtype)
    return (jnp.asarray(array, dtype),)


def whole(given):
    wide = [np.asarray(part).astype(np.float64) for part in given]
    return wide[0] if len(wide) == 1 else wide[0] + 1j * wide[1]


def narrowed(tree, dtype):
    """Return a tree rounded to `dtype` as the kernel's inputs are, in float64."""
    return [whole(parts(x, dtype)) for x in tree]
