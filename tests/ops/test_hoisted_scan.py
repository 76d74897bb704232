"""The loop over steps: its memory, its effects, and what cells compute outside of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import cells
from seqjax.ops.nonlinear import hoisted_scan, implicit_diff, state_columns
from tests.contract.cases import cell_params

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def outer_products(p, h, x):
    """Return the next state from a matrix of the input, much larger than the input."""
    return jnp.tanh((x[:, None] * x[None, :] * p) @ h)


@jax.custom_jvp
def inner_product(x):
    return jnp.sum(x[:, None] * x[None, :], axis=1)


inner_product.defjvps(lambda t, y, x: t * y)


def within_a_call(p, h, x):
    """Return the next state; the large value is inside of one operation of the program."""
    return jnp.tanh(p[0] * h + inner_product(x))


def arrays(length, dim=64):
    shapes = (dim, dim), (2, length, dim), (2, dim)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def test_large_values_of_inputs_are_not_stored_for_all_steps():
    """Check the memory of the loop: the large values of all steps would take 33.6 MB."""

    def run(p, x, h):
        return seqjax.nonlinear_scan(outer_products, p, x, h, algorithm="sequential")[0]

    memory = jax.jit(run).lower(*arrays(1024)).compile().memory_analysis().temp_size_in_bytes
    assert memory < 6 * 2 * 1024 * 64 * 4  # inputs and states


@pytest.mark.parametrize("cell", [outer_products, within_a_call])
def test_programs_have_no_large_values_of_all_steps(cell):
    def run(p, x, h):
        def step(h, x):
            return (h := cell(p, h, x)), h

        return hoisted_scan.hoisted_scan(step, h, x)

    program = str(jax.make_jaxpr(run)(*arrays(11)))
    assert "22,64" in program  # values of two sequences of 11 steps
    assert "22,64,64" not in program


def test_the_adjoint_stores_no_large_values_for_all_steps():
    """Check the loop of the adjoint, whose large values depend on the states."""

    def step_back(p, x, h):
        cell = functools.partial(lambda p, h, x: outer_products(p, h, h * x), p)
        step = state_columns.on_columns(cell, (64,))
        return implicit_diff._step_back(step, x, [x], None, [x])

    memory = jax.jit(step_back).lower(*arrays(1024)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10 * 2 * 1024 * 64 * 4


@pytest.mark.parametrize("cell", [cells.GRU(8), cells.LSTM(8), cells.SLSTM(8)], ids=repr)
def test_cells_compute_all_values_of_inputs_outside_of_the_loop(cell, monkeypatch):
    rng = np.random.default_rng(0)
    params = cell_params(rng, cell, 1.0)
    xs = jnp.asarray(rng.standard_normal((2, 3, cell.gates, 8)))
    h0 = cell.initial_state(2)
    states = jnp.broadcast_to(h0[:, None], (2, 3, *h0.shape[1:]))

    def step(h, x):
        return (h := cell(params, h, x)), h

    def programs():
        yield str(jax.make_jaxpr(lambda h, x: hoisted_scan.hoisted_scan(step, h, x))(h0, xs))
        shape = h0.shape[1:]
        columns = state_columns.split_state(states, shape)
        on_columns = state_columns.on_columns(functools.partial(cell, params), shape)
        back = functools.partial(implicit_diff._step_back, on_columns)
        yield str(jax.make_jaxpr(lambda x, h: back(x, h, None, h))(xs, columns))

    limited = list(programs())
    monkeypatch.setattr(hoisted_scan, "LARGEST", float("inf"))
    assert list(programs()) == limited


def test_effects_of_a_cell_happen_at_every_step():
    seen = []

    def cell(p, h, x):
        jax.debug.callback(lambda x: seen.append(int(x)), x[0])
        return jnp.tanh(p * h + x)

    xs = jnp.arange(5.0)[None, :, None]

    def run(p):
        return seqjax.nonlinear_scan(cell, p, xs, jnp.zeros((1, 1)), algorithm="sequential")[0]

    hs = jax.block_until_ready(run(jnp.ones(1)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(5))
    h = np.zeros(1)
    for t in range(5):
        h = np.tanh(h + t)
        np.testing.assert_allclose(hs[0, t], h, rtol=1e-6)
    grad, wanted = (
        jax.grad(lambda p, c=c: jnp.sum(c(p)))(jnp.ones(1)) for c in (run, _in_a_python_loop)
    )
    np.testing.assert_allclose(grad, wanted, rtol=1e-5)


def _in_a_python_loop(p):
    h, total = jnp.zeros(1), 0.0
    for t in range(5):
        h = jnp.tanh(p * h + t)
        total = total + jnp.sum(h)
    return total


def gradient_program(cell, batch=3, length=37):
    """Return the compiled text of a cell's gradient, step by step."""
    params = cell_params(np.random.default_rng(0), cell, 1.0)
    xs, h0 = jnp.ones((batch, length, cell.gates, 16)), cell.initial_state(batch)

    def loss(params, xs):
        return jnp.sum(cell.output(seqjax.nonlinear_scan(cell, params, xs, h0)[0]) ** 2)

    return jax.jit(jax.grad(loss, (0, 1))).lower(params, xs).compile().as_text()


@pytest.mark.parametrize("cell", [cells.GRU(16), cells.LSTM(16)], ids=repr)
def test_no_array_of_all_steps_is_transposed(cell):
    """Check that no array has time first, and no step alternates coupled numbers in memory."""
    program = gradient_program(cell)
    assert "f32[3,37," in program
    assert "f32[37,3," not in program
    assert "f32[3,16,2]" not in program


def test_the_loop_reads_gates_in_place_and_adds_their_bias():
    """Check the arrays of all steps: inputs, and no gate or sum for itself."""
    bias = jnp.ones((3, 16))

    def run(x, h):
        def step(h, x):
            gates = x + bias
            h = jnp.tanh(gates[0] * h + gates[1]) + gates[2]
            return h, h

        return hoisted_scan.hoisted_scan(step, h, x)[1]

    program = jax.jit(run).lower(jnp.ones((2, 37, 3, 16)), jnp.ones((2, 16))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 37 * 2 * 16 * 4
