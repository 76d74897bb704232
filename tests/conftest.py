import importlib.metadata
import os

# Before jax is imported anywhere: eight devices for the sharding tests, no accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compilation is most of the time of these tests, and on the oldest jax XLA's new code generator for
# CPU takes half of it. On newer ones, where nobody can choose, the tests run with it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Splitting each program for parallel code generation costs 10 % to 20 % more on two cores.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

import jax
import pytest

from tests.contract.harness import unoptimized

jax.config.update("jax_num_cpu_devices", 8)


_tests_run = 0


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Drop compiled programs now and then.

    Each holds memory maps, a process may have 65,530 of them, and the compiler crashes on the
    next one.
    """
    yield
    global _tests_run
    _tests_run += 1
    if _tests_run % 200 == 0:
        jax.clear_caches()


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


@pytest.fixture(scope="module")
def quick_compilation():
    """Compilation is nearly all the time these tests take, and tiny models need no fast code."""
    with unoptimized():
        yield


@pytest.fixture
def compiled_quickly():
    """The same for a single test: of a rule, not of numbers that the compiler could change."""
    with unoptimized():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small folder of text, so that no test reads the whole standard library."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        lines = "".join(f"line {n} of file {index}: {n * n * index}\n" for n in range(60))
        (folder / f"{index}.txt").write_text(lines)
    return folder
