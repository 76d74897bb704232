"""Contract: derivatives. Reverse, forward and second order, against the oracle's differences."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from tests.contract.harness import (
    THOROUGH,
    assert_close,
    by_variant,
    cast,
    contract,
    keywords,
    make,
    one_layer_of_each_kind,
    runner,
    runner_with_gradients,
    state_weights,
    unoptimized,
    weights,
    wrapped,
)

EACH = by_variant()


def direction(tree, seed=3):
    return weights(tree, seed)


def moved(tree, along, distance):
    return jax.tree.map(lambda x, d: np.asarray(x) + distance * np.asarray(d), tree, along)


@functools.cache
def slopes(case):
    """Return weights of outputs and state, and slopes of the oracle's loss along each argument.

    All algorithms of a row share them. The key of the state's slope is None.
    """
    inputs, state, reset = make(case)
    out, final = case.oracle(inputs, state, reset)
    w_out, w_state = weights(out), state_weights(case, final)

    def loss(inputs, state):
        out, final = case.oracle(inputs, state, reset)
        total = contract(out, w_out)
        return float(total if final is None else total + contract(final, w_state))

    def slope(leaf_inputs, leaf_state):
        step = 1e-5
        a, b, c, d = (
            loss(moved(inputs, leaf_inputs, n * step), moved(state, leaf_state, n * step))
            for n in (-2, -1, 1, 2)
        )
        # Of fourth order: those of second order err by 1e-6 where a norm is small.
        return (a - 8 * b + 8 * c - d) / (12 * step)

    still_inputs = jax.tree.map(np.zeros_like, inputs)
    still_state = jax.tree.map(np.zeros_like, state)
    found = {
        name: slope({**still_inputs, name: direction(inputs[name])}, still_state) for name in inputs
    }
    if state is not None:
        found[None] = slope(still_inputs, direction(state))
    return w_out, w_state, found


@EACH
def test_gradients_match_the_loop(case, algorithm, x64, strict, compiled_quickly):
    """Check the gradient of each argument and of the state along a random direction."""
    inputs, state, reset = make(case)
    w_out, w_state, expected = slopes(case)
    grads, state_grad = runner_with_gradients(case, algorithm)(
        cast(inputs, "float64"), cast(state, "float64"), reset, w_out, w_state
    )
    for name, slope in expected.items():
        gradient, at = (state_grad, state) if name is None else (grads[name], inputs[name])
        # Differences of a float64 loop are good to about 1e-9, also where the slope is zero because
        # a reset clears the state.
        found = contract(gradient, direction(at))
        if not abs(found - slope) <= 1e-9:  # NaN too
            assert_close(found, np.float64(slope), 1e-6)


@by_variant(
    variant=lambda case, algorithm: case.hard is None or not wrapped(case, algorithm),
    quick={"monoid_scan-softmax", "nonlinear_scan-block", "LRU"},
)
def test_float32_gradients(case, algorithm, strict):
    """Compare float32 gradients with those in float64.

    `test_hard_inputs_have_finite_gradients` compares those of the variants that are not here. XLA
    optimizes the program of the thorough rows; the other rows are layers on these ops.
    """
    inputs, state, reset = make(case)
    w_out, w_state, _ = slopes(case)
    gradient = runner_with_gradients(case, algorithm)
    with jax.enable_x64(True), unoptimized():
        wide = gradient(cast(inputs, "float64"), cast(state, "float64"), reset, w_out, w_state)
        wide = jax.tree.map(np.asarray, wide)
    w_out, w_state = cast((w_out, w_state), "float32")
    with contextlib.nullcontext() if case.name in THOROUGH else unoptimized():
        narrow = gradient(cast(inputs, "float32"), cast(state, "float32"), reset, w_out, w_state)
    assert_close(narrow, wide, 1e-4)


@by_variant(
    one_layer_of_each_kind,
    every_kernel=False,
    variant=wrapped,
    quick={"linear_scan", "log_scan", "delta_rule-channel", "nonlinear_scan-block"},
)
def test_forward_mode_is_the_transpose_of_reverse_mode(
    case, algorithm, x64, strict, compiled_quickly
):
    """Check every op, and one layer of each kind: a layer has no derivative rules."""
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
@by_variant(one_layer_of_each_kind, every_kernel=False, variant=wrapped)
def test_second_derivatives(case, algorithm, x64, strict, compiled_quickly):
    """Compare directional derivatives of the gradients with finite differences, per argument.

    The derivatives of a layer follow from those of its ops: a row of each kind is enough.
    """
    inputs, state, reset = make(case)
    w_out, w_state, _ = slopes(case)
    gradient = runner_with_gradients(case, algorithm)
    point = cast((inputs, state, w_out, w_state), "float64")
    along = cast(direction(point), "float64")

    def at(inputs, state, w_out, w_state):
        return gradient(inputs, state, reset, w_out, w_state)

    _, derivative = jax.jit(lambda point, along: jax.jvp(at, point, along))(point, along)
    # Differences of fourth order: those of second order err by 2e-6 where a normalizer is small.
    step = 1e-4
    values = [at(*cast(moved(point, along, n * step), "float64")) for n in (-2, -1, 1, 2)]
    differences = jax.tree.map(
        lambda a, b, c, d: (
            (np.asarray(a) - 8 * np.asarray(b) + 8 * np.asarray(c) - d) / (12 * step)
        ),
        *values,
    )
    assert_close(derivative, differences, 1e-6)
