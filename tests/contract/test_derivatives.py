"""Contract: derivatives. Reverse, forward and second order, against the oracle's differences."""

import functools

import jax
import numpy as np
import pytest

from tests.contract.harness import (
    assert_close,
    by_variant,
    cast,
    contract,
    keywords,
    make,
    runner,
    runner_with_gradients,
    state_weights,
    unoptimized,
    weights,
)

EACH = by_variant()
# Forward mode and second derivatives are those of the XLA form, whoever computes the values.
BUT_KERNELS = by_variant(every_kernel=False)


def direction(tree, seed=3):
    return weights(tree, seed)


def moved(tree, along, distance):
    return jax.tree.map(lambda x, d: x + distance * d, tree, along)


@EACH
def test_gradients_match_the_loop(case, algorithm, x64, strict, compiled_quickly):
    """Each argument's gradient, the state's included, along a random direction."""
    inputs, state, reset = make(case)
    out, final = case.oracle(inputs, state, reset)
    w_out, w_state = weights(out), state_weights(case, final)
    grads, state_grad = runner_with_gradients(case, algorithm)(
        cast(inputs, "float64"), cast(state, "float64"), reset, w_out, w_state
    )

    def loss(inputs, state):
        out, final = case.oracle(inputs, state, reset)
        total = contract(out, w_out)
        return float(total if final is None else total + contract(final, w_state))

    def slope(leaf_inputs, leaf_state):
        step = 1e-5
        up = loss(moved(inputs, leaf_inputs, step), moved(state, leaf_state, step))
        down = loss(moved(inputs, leaf_inputs, -step), moved(state, leaf_state, -step))
        return (up - down) / (2 * step)

    still_inputs = jax.tree.map(np.zeros_like, inputs)
    still_state = jax.tree.map(np.zeros_like, state)
    for name in inputs:
        along = direction(inputs[name])
        expected = slope({**still_inputs, name: along}, still_state)
        # Central differences of a float64 loop are good to about 1e-9.
        assert_close(contract(grads[name], along), np.float64(expected), 1e-6)
    if state is not None:
        along = direction(state)
        expected = slope(still_inputs, along)
        assert_close(contract(state_grad, along), np.float64(expected), 1e-6)


@EACH
def test_float32_gradients(case, algorithm, strict):
    inputs, state, reset = make(case)
    with jax.enable_x64(True), unoptimized():
        shapes = jax.eval_shape(case.run, cast(inputs, "float64"), cast(state, "float64"), reset)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        w_out, w_state = weights(zeros[0]), state_weights(case, zeros[1])
        wide = runner_with_gradients(case, algorithm)(
            cast(inputs, "float64"), cast(state, "float64"), reset, w_out, w_state
        )
        wide = jax.tree.map(np.asarray, wide)
    w_out, w_state = cast((w_out, w_state), "float32")
    narrow = runner_with_gradients(case, algorithm)(
        cast(inputs, "float32"), cast(state, "float32"), reset, w_out, w_state
    )
    assert_close(narrow, wide, 1e-4)


@BUT_KERNELS
def test_forward_mode_is_the_transpose_of_reverse_mode(
    case, algorithm, x64, strict, compiled_quickly
):
    inputs, state, reset = make(case)
    primals = (cast(inputs, "float64"), cast(state, "float64"))
    tangents = cast(direction(primals), "float64")
    run = functools.partial(case.run, **keywords(algorithm))

    @jax.jit
    def forward(primals, tangents):
        return jax.jvp(lambda i, s: run(i, s, reset), primals, tangents)

    (out, final), (d_out, d_final) = forward(primals, tangents)
    assert_close((out, final), runner(case, algorithm)(*primals, reset), 1e-12)
    w_out = weights(out)
    w_state = state_weights(case, final)
    grads = runner_with_gradients(case, algorithm)(*primals, reset, w_out, w_state)
    forwards = contract(d_out, w_out)
    if w_state is not None:
        forwards = forwards + contract(d_final, w_state)
    assert_close(forwards, contract(grads, tangents), 1e-10)


@pytest.mark.slow
@BUT_KERNELS
def test_second_derivatives(case, algorithm, x64, strict, compiled_quickly):
    """A Hessian-vector product against differences of gradients."""
    inputs, state, reset = make(case)
    primals = (cast(inputs, "float64"), cast(state, "float64"))
    tangents = cast(direction(primals), "float64")
    run = functools.partial(case.run, **keywords(algorithm))

    def loss(inputs, state):
        leaves = jax.tree.leaves(run(inputs, state, reset)[0])
        return sum(jax.numpy.sum(jax.numpy.sin(jax.numpy.real(leaf))) for leaf in leaves)

    gradient = jax.grad(loss, argnums=(0, 1))
    step = 1e-5

    @jax.jit
    def both(primals, tangents):
        _, hvp = jax.jvp(gradient, primals, tangents)
        up, down = (
            gradient(*jax.tree.map(lambda p, t, s=s: p + s * t, primals, tangents))
            for s in (step, -step)
        )
        return hvp, jax.tree.map(lambda u, d: (u - d) / (2 * step), up, down)

    hvp, differences = both(primals, tangents)
    assert_close(hvp, differences, 1e-6)
