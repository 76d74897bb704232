"""GPU kernel of cells with matrices, interpreted: values and gradients by the sequential form.

The interpreter runs one warpgroup as one thread, and finds races between warpgroups.
`test_aot_gpu` compiles the kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from pallas_kernels.nonlinear_scan import gpu, gpu_dense_layout
from seqjax.cells import GRU, LSTM, MGU, DenseSLSTM, Elman, Headwise
from seqjax.ops.nonlinear import cell_kernel
from tests.contract.harness import assert_close
from tests.kernels.gpu import KERNEL, TOLERANCE, interpreted
from tests.kernels.nonlinear import INTERPRETED, SEQUENTIAL, arrays, pulled, several_pulled


@pytest.fixture
def by_gpu_kernel(monkeypatch):
    """Interpret the GPU kernel; by default, interpret mode runs these cells by that for TPU."""
    monkeypatch.setattr(cell_kernel, "refused", lambda *_: ())


# Two pieces have 16 bits, and their products lose terms of 2^-16.
PRECISIONS = {"highest": 2e-6, "default": TOLERANCE["float32"]}


def compared(cell, batch, length, precision, tolerance, dtype="float32"):
    channels = getattr(cell, "cell", cell).dim
    given = arrays(cell, batch, length, dtype, scale=channels**-0.5)
    with jax.default_matmul_precision(precision):
        found = pulled(cell, *given, **INTERPRETED)
    assert_close(found, pulled(cell, *given, **SEQUENTIAL), tolerance)


@interpreted
def test_a_cell_with_a_matrix(by_gpu_kernel, compiled_quickly):
    compared(Elman(64), 2, 3, "highest", 2e-6)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "batch", "precision"),
    [
        (GRU(64), 9, "default"),  # two thread blocks, of which the last has one sequence
        (LSTM(24, peepholes=True), 2, "highest"),  # channels that are no whole tile
        (Elman(72), 2, "highest"),  # two warpgroups, of which the last has eight channels
        (MGU(64), 2, "highest"),  # its second product is not of the state
        (DenseSLSTM(16), 2, "default"),
        (Headwise(GRU(64), 2), 3, "highest"),
    ],
    ids=str,
)
def test_cells(cell, batch, precision, by_gpu_kernel, compiled_quickly):
    """Compare over more steps than are prefetched."""
    compared(cell, batch, 6, precision, PRECISIONS[precision])


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("cell", [LSTM(128), Headwise(GRU(64), 2)], ids=repr)
def test_narrow_inputs(cell, by_gpu_kernel, compiled_quickly):
    compared(cell, 2, 5, None, TOLERANCE["bfloat16"], "bfloat16")


@interpreted
@pytest.mark.slow
def test_more_sequences_in_a_thread_block(monkeypatch, by_gpu_kernel, compiled_quickly):
    """Use one thread block of 16 sequences for 10, without resets, and a single step."""
    monkeypatch.setattr(gpu_dense_layout, "MULTIPROCESSORS", 1)
    params, xs, state, _, cts = arrays(Elman(128), 10, 1, scale=128**-0.5)
    given = params, xs, state, None, cts
    with jax.default_matmul_precision("highest"):
        found = pulled(Elman(128), *given, **INTERPRETED)
    assert_close(found, pulled(Elman(128), *given, **SEQUENTIAL), 2e-6)


@interpreted
@pytest.mark.slow
def test_a_cell_of_the_user(by_gpu_kernel, compiled_quickly):
    with jax.default_matmul_precision("highest"):
        found = several_pulled(64, **INTERPRETED)
    assert_close(found, several_pulled(64, **SEQUENTIAL), 2e-6)


@interpreted
@pytest.mark.slow
def test_nothing_crosses_a_reset(by_gpu_kernel, compiled_quickly):
    cell = GRU(64)
    params, xs, state, reset, cts = arrays(cell, 1, 8, scale=1 / 8)
    reset = jnp.zeros_like(reset).at[0, 5].set(True)
    xs, state = xs.at[0, 3].set(jnp.nan), jnp.full_like(state, jnp.nan)
    with jax.default_matmul_precision("highest"):
        (hs, final), (_, d_xs, _) = pulled(cell, params, xs, state, reset, cts, **INTERPRETED)
    assert np.isnan(hs[0, :5]).all()
    after = params, xs[:, 5:], jnp.zeros_like(state), None, (cts[0][:, 5:], cts[1])
    out, (_, expected, _) = pulled(cell, *after, **SEQUENTIAL)
    assert_close((hs[:, 5:], final), out, 2e-6)
    assert_close(d_xs[:, 5:], expected, 2e-6)


def lowered(function, *args):
    """Return the program lowered for GPU, without a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [None, 2])
def test_it_has_to_be_named(heads):
    keywords = {} if heads is None else {"heads": heads}
    layer = seqjax.layers.GRU(64, **keywords)
    named = seqjax.layers.GRU(64, implementation="pallas", **keywords)
    params, x = layer.init(jax.random.key(0)), jnp.ones((2, 16, 64))

    def loss(params, x):
        return jnp.sum(named.apply(params, x)[0])

    assert KERNEL not in lowered(layer.apply, params, x)
    assert lowered(named.apply, params, x).count(KERNEL) == 1
    assert lowered(jax.grad(loss), params, x).count(KERNEL) == 2
    mapped = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    assert lowered(mapped, params, jnp.stack([x, x])).count(KERNEL) == 2


@pytest.mark.parametrize(
    ("cell", "precision", "message"),
    [
        (LSTM(128), None, "at most 225 KiB .* got 296 KiB for 4 matrices of D=128 with 4 bytes"),
        (LSTM(72), "highest", "for 4 matrices of D=72 with 6 bytes per number; use fewer channels"),
        (Elman(64), "F64_F64_F64", "a precision of DEFAULT, .* got F64_F64_F64"),
    ],
    ids=["default", "highest", "precision"],
)
def test_what_it_cannot_do(cell, precision, message):
    params, xs, state, *_ = arrays(cell, 1, 3)
    run = functools.partial(gpu.scan, cell, out_dtype="float32")
    with (
        jax.default_matmul_precision(precision),
        pytest.raises(NotImplementedError, match=f"^nonlinear_scan: .*{message}"),
    ):
        jax.eval_shape(run, params, xs, state, None)


@pytest.mark.parametrize(
    ("precisions", "narrow", "pieces"),
    [
        ([None], True, 1),
        ([None], False, 2),
        ([(jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT)], False, 2),
        ([None, (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)], True, 3),
        ([jax.lax.DotAlgorithmPreset.BF16_BF16_F32], False, 1),
        ([jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3], True, 2),
    ],
)
def test_pieces_of_a_number(precisions, narrow, pieces):
    assert gpu_dense_layout.count_pieces(precisions, narrow) == pieces
