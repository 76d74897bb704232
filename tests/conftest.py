import gc
import importlib.metadata
import os

# Set before the first import of jax: eight CPU devices for the sharding tests, no accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compilation takes most of the time of these tests. On the oldest jax, XLA's new CPU code generator
# takes half of it, so it is switched off. Newer versions always use it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Splitting each program for parallel code generation costs 10 % to 20 % more on two cores.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.contract.harness import row_of, unoptimized

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many objects that live long. With Python's default of a collection per 700 of them,
# collections take a tenth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark as slow the parameter sets that a `quick` mark does not name."""
    unknown = {}
    for item in items:
        for mark in item.iter_markers("quick"):
            name = item.nodeid.partition("[")[0]
            unknown.setdefault(name, set(mark.args)).discard(item.callspec.id)
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.slow)
    whole = not any("::" in argument for argument in config.args)
    for name, ids in unknown.items():
        if whole and ids:
            raise pytest.UsageError(f"{name}: no parameter set has the quick ids {sorted(ids)}")


class RowScheduling(LoadScopeScheduling):
    """Give all tests of a contract row to one worker, and every other test to the next free one."""

    def _split_scope(self, nodeid):
        return row_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return RowScheduling(config, log)


_tests_run = 0


def pytest_runtest_teardown(item, nextitem):
    """Drop compiled programs periodically, between two rows.

    Each program has memory maps. A process may have 65,530 of them; the compiler crashes on the
    next one.
    """
    global _tests_run
    _tests_run += 1
    if (
        _tests_run >= 100
        and nextitem is not None
        and row_of(item.nodeid) != row_of(nextitem.nodeid)
    ):
        jax.clear_caches()
        _tests_run = 0


@pytest.fixture
def x64():
    """Enable float64, for comparison with the float64 oracles."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Forbid implicit promotion between dtypes inside the library."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile quickly: compilation takes nearly all the time of tests of tiny models."""
    with unoptimized():
        yield


@pytest.fixture
def compiled_quickly():
    """Compile quickly in one test, whose result does not depend on optimizations."""
    with unoptimized():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a small folder of text, so that no test reads the whole standard library."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        lines = "".join(f"line {n} of file {index}: {n * n * index}\n" for n in range(60))
        (folder / f"{index}.txt").write_text(lines)
    return folder
