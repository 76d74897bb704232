"""Contract: reverse mode stores inputs, outputs and one state per chunk, nothing of size T K V."""

import functools

import jax
import jax.numpy as jnp
import pytest

import seqjax

# Buffers have the same sizes with and without the optimizations that this leaves out.
pytestmark = pytest.mark.usefixtures("compiled_quickly")
H, K = 4, 64


def matrix_shapes(length):
    row, gate = (1, length, H, K), (1, length, H)
    return {
        "linear_attention": (row, row, row),
        "linear_attention, scalar": (row, row, row, gate),
        "linear_attention, channel": (row, row, row, row),
        "delta_rule": (row, row, row, gate),
        "delta_rule, scalar": (row, row, row, gate, gate),
        "delta_rule, channel": (row, row, row, gate, row),
        "generalized_delta_rule": (row,) * 6,
    }


def temporary_bytes(op, shapes, **keywords):
    """Return the bytes of temporaries of the compiled forward and backward pass."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def both(weights, *args):
        (y, state), pull = jax.vjp(lambda *a: op(*a, **keywords), *args)
        return y, pull((weights, jnp.ones_like(state)))

    out = jax.eval_shape(lambda *a: op(*a, **keywords)[0], *arrays)
    memory = jax.jit(both).lower(out, *arrays).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name == "delta_rule, channel" else pytest.param(name, marks=pytest.mark.slow)
        for name in matrix_shapes(1)
    ],
)
def test_matrix_states_are_not_stored(name):
    op = getattr(seqjax, name.split(",")[0])
    sizes = {t: temporary_bytes(op, matrix_shapes(t)[name]) for t in (4096, 16384)}
    at_rest = 4 * 16384 * H * K * 4  # q, k, v and o
    assert sizes[16384] < 8 * at_rest
    assert sizes[16384] < 4.4 * sizes[4096]


@pytest.mark.slow
def test_selective_scan_states_are_not_stored():
    def shapes(length):
        row, gate = (1, length, 512), (1, length, 16)
        return row, row, (512, 16), gate, gate

    sizes = {t: temporary_bytes(seqjax.selective_scan, shapes(t)) for t in (2048, 8192)}
    at_rest = 3 * 8192 * 512 * 4  # x, dt and y
    assert sizes[8192] < 8 * at_rest
    assert sizes[8192] < 4.4 * sizes[2048]


@pytest.mark.parametrize("algorithm", ["sequential", "chunked"])
def test_linear_scan_stores_its_outputs_only(algorithm):
    row = (2, 4096, 64)
    size = temporary_bytes(seqjax.linear_scan, (row, row), algorithm=algorithm)
    assert size < 1.2 * 2 * 4096 * 64 * 4  # the adjoint, in addition to the results


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sequential", "chunked"])
def test_ssm_scan_states_are_not_stored(algorithm):
    def shapes(length):
        return (1, length, 512), (512, 64), (512, 64), (512, 64)

    run = functools.partial(temporary_bytes, seqjax.ssm_scan, algorithm=algorithm)
    sizes = {t: run(shapes(t)) for t in (2048, 8192)}
    states = 8192 * 512 * 64 * 4
    assert sizes[8192] < states / 3
    assert sizes[8192] < 4.4 * sizes[2048]


@pytest.mark.parametrize("algorithm", ["sequential", "chunked", "associative"])
def test_block_scan_stores_its_outputs_only(algorithm):
    """Check a constant transition: a few rows, and no block for every step."""
    if algorithm == "associative" and jax.__version_info__ >= (0, 11):
        pytest.skip("XLA of jax 0.11 and newer keeps the arrays of all levels on a CPU: 27 rows")
    row, block = (1, 8192, 32, 4), (32, 4, 4)
    size = temporary_bytes(seqjax.block_scan, (block, row), algorithm=algorithm)
    assert size < 8 * 8192 * 32 * 4 * 4
