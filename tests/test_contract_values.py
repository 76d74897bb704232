"""Contract: the numbers. Every algorithm against the float64 loop, in every dtype and length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import OPS, ROWS
from tests.harness import (
    assert_close,
    by_variant,
    cast,
    cast_inputs,
    error,
    keywords,
    make,
    runner,
)

EACH = by_variant()


def judged(result, expected):
    """Layers' final states are judged by continuing from them (test_contract_state)."""
    return (result[0],) if expected[1] is None else result, (
        (expected[0],) if expected[1] is None else expected
    )


@EACH
def test_float64_matches_the_loop(case, algorithm, x64, strict):
    inputs, state, reset = make(case)
    result = runner(case, algorithm)(cast(inputs, "float64"), cast(state, "float64"), reset)
    assert_close(*judged(result, case.oracle(inputs, state, reset)), case.tolerance["float64"])


@EACH
def test_without_state_and_reset(case, algorithm, x64, strict):
    inputs, state, reset = make(case)
    run = jax.jit(lambda inputs: case.run(inputs, None, None, **keywords(algorithm)))
    no_reset = np.zeros_like(reset)
    if case.name.startswith("monoid_scan"):  # without a state the first element is the state
        no_reset[:, 0] = True
    elif state is not None:
        state = jax.tree.map(np.zeros_like, state)
    expected = case.oracle(inputs, state, no_reset)
    assert_close(*judged(run(cast(inputs, "float64")), expected), case.tolerance["float64"])


LENGTHS = [1, 2, 65] + [pytest.param(n, marks=pytest.mark.slow) for n in (63, 64, 1000)]


@pytest.mark.parametrize("length", LENGTHS)
@EACH
def test_float32_at_any_length(case, algorithm, length, strict):
    inputs, state, reset = make(case, length=length)
    run = runner(case, algorithm, chunk_size=16)
    result = run(cast(inputs, "float32"), cast(state, "float32"), reset)
    assert_close(*judged(result, case.oracle(inputs, state, reset)), case.tolerance["float32"])


@EACH
def test_bfloat16_keeps_its_state_in_float32(case, algorithm, strict):
    inputs, state, reset = make(case)
    if any(np.iscomplexobj(leaf) for leaf in jax.tree.leaves(inputs)):
        pytest.skip("no complex bfloat16")
    narrow = cast_inputs(case, inputs, "bfloat16")
    out, final = runner(case, algorithm)(narrow, cast(state, "float32"), reset)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    for leaf in jax.tree.leaves(final):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert leaf.dtype in (jnp.float32, jnp.complex64)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), narrow)
    assert_close(
        *judged((out, final), case.oracle(rounded, state, reset)), case.tolerance["bfloat16"]
    )


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_output_and_state_dtypes(case, x64, strict):
    inputs, state, reset = make(case)
    for dtype, real, complex_ in (
        ("float32", jnp.float32, jnp.complex64),
        ("float64", jnp.float64, jnp.complex128),
    ):
        shapes = jax.eval_shape(case.run, cast(inputs, dtype), cast(state, dtype), reset)
        for leaf in jax.tree.leaves(shapes):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                assert leaf.dtype in (real, complex_)


def extreme(kind, shape, rng):
    """0, 1, exp(-30), 1 - 1e-7 and everyday values, in any mix."""
    values = np.array([0.0, 1.0, np.exp(-30.0), 1 - 1e-7, 0.9])
    with np.errstate(divide="ignore"):
        values = np.log(values) if kind == "log" else values
    return rng.choice(values, shape)


@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [(c, a) for c in OPS if c.decays for a in c.algorithms],
    ids=lambda value: str(value),
)
def test_extreme_decays(case, algorithm, length, strict):
    inputs, state, reset = make(case, length=length)
    name, kind = case.decays
    inputs[name] = extreme(kind, inputs[name].shape, np.random.default_rng(1)).astype(
        inputs[name].dtype
    )
    inputs = jax.tree.map(lambda v: np.asarray(cast(v, "float32")), inputs)  # what both see
    run = runner(case, algorithm, chunk_size=16)
    result = run(cast(inputs, "float32"), cast(state, "float32"), reset)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    wide = jax.tree.map(
        lambda v: v.astype(np.complex128 if np.iscomplexobj(v) else np.float64), inputs
    )
    # The state is a sum of up to 1000 terms that do not decay: the contract's 1e-4.
    assert_close(result, case.oracle(wide, state, reset), 1e-4)


def test_the_judge_can_fail():
    value = np.ones((2, 3))
    assert error({"a": value}, {"a": value})[0] == 0
    off = value.copy()
    off[1, 2] = 1.5
    worst, place = error({"a": off}, {"a": value})
    assert worst == 0.5
    assert "[1, 2]" in place
    off[0, 0] = np.nan
    with pytest.raises(AssertionError, match="error"):
        assert_close(off, value, 1.0)
