"""GPU kernels compiled for an H100 without a GPU, and the ptxas reports of the kernels.

Needs jax's CUDA plugin, without NVIDIA's libraries: the extra `aot-gpu`. A separate process
compiles each program and writes the report.
"""

import functools
import importlib.util
import itertools
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest

import seqjax
from experiments.bench import gpu

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="compiles for GPU ahead of time: pip install -e '.[aot-gpu]'",
    ),
]


SIZES = "B=8, T=4096, D=2560"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(
            [f"linear_scan, {SIZES}", f"linear_scan backward, {SIZES}"], ["float32", "bfloat16"]
        ),
        (f"nonlinear_scan, ParaLSTM, {SIZES}", "bfloat16"),
        (f"nonlinear_scan backward, ParaLSTM, {SIZES}", "bfloat16"),
    ],
)
def test_registers_and_shared_memory(name, dtype, tmp_path):
    report = gpu.compile_apart(name, dtype, folder=tmp_path)
    assert report.spills == 0
    assert report.registers <= 128  # 512 threads of a multiprocessor's 65,536
    # Two thread blocks on a multiprocessor: 160 of them find place on 132 at once.
    assert 2 * (report.shared + 1024) <= gpu.SHARED_PER_CORE


@pytest.mark.parametrize(
    ("way", "dtype", "blocks"),
    [("", "bfloat16", 2), (" backward", "float32", 1)],
    ids=["forward", "backward"],
)
def test_states_stay_on_the_chip(way, dtype, blocks, tmp_path):
    """Check the selective scan: no register spills, and no array [B, T, D, N]."""
    report = gpu.compile_apart(
        f"selective_scan{way}, B=8, T=4096, D=2048, N=16", dtype, folder=tmp_path
    )
    assert report.spills == 0
    assert report.registers <= 255
    assert blocks * (report.shared + 1024) <= gpu.SHARED_PER_CORE
    program = (tmp_path / "program.txt").read_text()
    arrays = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in arrays]
    # At the borders of blocks of 64 steps, and B's cotangents by each of 16 blocks of features.
    assert max(sizes) == 8 * 4096 * 2048


WITHOUT_SPILLS = (
    ("linear_attention", "", "head"),
    ("linear_attention", "", "channel"),
    ("linear_attention", " backward", "head"),
    ("delta_rule", "", "head"),
)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "generalized_delta_rule"])
@pytest.mark.parametrize("way", ["", " backward"], ids=["forward", "backward"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_matrix_states_use_tensor_cores(op, way, decay, tmp_path):
    if op == "generalized_delta_rule" and decay == "head":
        pytest.skip("the kernels repeat these decays over channels")
    name = f"{op}{way}, decay per {decay}, B=1, T=4096, H=8, K=V=128"
    report = gpu.compile_apart(name, "bfloat16", folder=tmp_path)
    if (op, way, decay) in WITHOUT_SPILLS:
        assert report.spills == 0
    assert report.shared + 1024 <= gpu.SHARED_PER_CORE
    for ptx in tmp_path.glob("*.ptx"):
        assert "wgmma.mma_async" in ptx.read_text()


CELL = "B=64, T=1024, D"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"nonlinear_scan, GRU, {CELL}=64", "float32"),
        (f"nonlinear_scan backward, GRU, {CELL}=64", "float32"),
        (f"nonlinear_scan, LSTM, {CELL}=128", "bfloat16"),
        (f"nonlinear_scan backward, LSTM, {CELL}=128", "bfloat16"),
    ],
)
def test_matrices_of_cells_stay_on_the_chip(name, dtype, tmp_path):
    report = gpu.compile_apart(name, dtype, folder=tmp_path)
    assert report.spills == 0
    assert report.registers <= 255
    assert report.shared + 1024 <= gpu.SHARED_PER_CORE
    for ptx in tmp_path.glob("*.ptx"):
        assert "wgmma.mma_async" in ptx.read_text()


@pytest.fixture(scope="module")
def place():
    before = os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no CUDA here
    yield gpu.h100()
    if before is None:
        del os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"]


def _both(op):
    """Return a function for the values and all gradients of an op."""

    def run(*given):
        out, pull = jax.vjp(lambda *given: op(*given), *given)
        return out, pull(out)

    return jax.jit(run)


DEFAULTS = {
    "linear_scan": [(2, 64, 128)] * 2,
    "selective_scan": [(2, 64, 128), (2, 64, 128), (128, 4), (2, 64, 4), (2, 64, 4)],
}


@pytest.mark.parametrize("op", DEFAULTS)
def test_kernels_are_the_default_for_an_h100(op, place):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in DEFAULTS[op]]
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        program = _both(getattr(seqjax, op)).lower(*given).compile()
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 2


@pytest.mark.parametrize("op", DEFAULTS)
def test_xla_is_the_default_for_an_a100(op, place):
    del place  # sets the environment
    older = gpu.H100.replace(
        "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", "major: 8 minor: 0"
    )
    a100 = gpu.single_gpu("a100", older)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=a100) for shape in DEFAULTS[op]]
    with jax.sharding.use_abstract_mesh(a100.mesh.abstract_mesh):
        assert "mosaic_gpu" not in _both(getattr(seqjax, op)).lower(*given).as_text()


@pytest.mark.parametrize(
    ("dtype", "decay", "shape", "keywords"),
    [
        pytest.param("complex64", "BTD", (2, 300, 64), {}, id="complex"),
        pytest.param("float32", "TD", (2, 300, 136), {"reverse": True}, id="shared over batch"),
        pytest.param("bfloat16", "D", (2, 37, 8), {}, id="constant"),
        pytest.param("float32", "BTD", (2, 37, 128), {}, id="steps that hang over"),
        pytest.param("float32", "BTD", (2, 64, 128), {"block_sizes": (32, 128)}, id="block sizes"),
    ],
)
def test_other_forms_compile(dtype, decay, shape, keywords, place):
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    sizes = dict(zip("BTD", shape, strict=True))
    given = {"decay": array([sizes[axis] for axis in decay], dtype), "x": array(shape, dtype)}

    def both(given, reset):
        def run(given):
            return seqjax.linear_scan(**given, reset=reset, implementation="pallas", **keywords)

        out, pull = jax.vjp(run, given)
        return out, pull(out)

    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        program = jax.jit(both).lower(given, array(shape[:2], jnp.bool_)).compile()
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 2


@pytest.mark.slow
def test_selective_scan_of_any_length_compiles(place):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def both(given, reset):
        def run(given):
            return seqjax.selective_scan(*given, reset=reset, implementation="pallas")

        out, pull = jax.vjp(run, given)
        return out, pull(out)

    given = [array(2, 73, 72), array(2, 73, 72), array(72, 3), array(2, 73, 3), array(2, 73, 3)]
    reset = jax.ShapeDtypeStruct((2, 73), jnp.bool_, sharding=place)
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        program = jax.jit(both).lower(given, reset).compile()
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 2


def test_an_elementwise_cell_compiles(place):
    """Check logarithms, infinities, four numbers per channel, vmap, and a ragged last block."""
    _compile_cell(seqjax.cells.SLSTM(136), place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        seqjax.cells.LSTM(24, peepholes=True),
        seqjax.cells.MGU(72),
        seqjax.cells.Headwise(seqjax.cells.DenseSLSTM(64), 2),
    ],
    ids=repr,
)
def test_cells_with_matrices_compile(cell, place):
    _compile_cell(cell, place)


def _compile_cell(cell, place):
    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = {name: array(*cell.param_shape(name)) for name in cell.recurrent}
    state = array(*jax.eval_shape(lambda: cell.initial_state(2)).shape)
    given = (params, array(2, 2, 65, cell.gates, cell.dim), state)

    def both(reset, *given):
        run = functools.partial(seqjax.nonlinear_scan, cell, reset=reset, implementation="pallas")
        out, pull = jax.vjp(lambda *given: run(*given)[:2], *given)
        return out, pull(out)

    mapped = jax.vmap(both, in_axes=(None, None, 0, None))
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        program = jax.jit(mapped).lower(array(2, 65, dtype="bool"), *given).compile()
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 2


@pytest.mark.slow
def test_matrix_states_run_in_few_kernels_on_tensor_cores(tmp_path):
    """Check the XLA form of `linear_attention` with a decay per head, without gradients."""
    row = gpu.PROGRAMS[0]
    _, cost = gpu.compile_program_apart(row, tmp_path)
    assert cost.kernels <= 150
    assert cost.flops["bf16"] + cost.flops["tf32"] >= 0.9 * sum(cost.flops.values())
    assert cost.seconds <= 1e-3
