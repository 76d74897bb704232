import os

# Before jax is imported anywhere: eight devices for the sharding tests, no accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Float64 enabled: how the library is held against float64 loops."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No silent promotion between dtypes inside the library."""
    with jax.numpy_dtype_promotion("strict"):
        yield
