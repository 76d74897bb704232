"""Contract: values. Every algorithm against the float64 loop, in every dtype and length.

XLA optimizes one forward program of each variant, the one for the longest input, and 65 steps of
the thorough rows. It optimizes the gradients of hard inputs and, for the thorough rows without hard
inputs, those of `test_float32_gradients`. The other programs compile quickly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.harness import (
    THOROUGH,
    T,
    assert_close,
    by_row,
    by_variant,
    cast,
    cast_inputs,
    error,
    keywords,
    make,
    runner,
    runner_with_gradients,
    unoptimized,
    weights,
    wrapped,
)

EACH = by_variant()


@functools.lru_cache(maxsize=16)
def looped(case, length=T):
    """Return the oracle's results, which all algorithms of a row share."""
    return case.oracle(*make(case, length=length))


def judged(result, expected):
    """Return result and reference without the final states of layers, which `test_state` tests."""
    return (result[0],) if expected[1] is None else result, (
        (expected[0],) if expected[1] is None else expected
    )


@EACH
def test_float64_matches_the_loop(case, algorithm, x64, strict, compiled_quickly):
    inputs, state, reset = make(case)
    result = runner(case, algorithm)(cast(inputs, "float64"), cast(state, "float64"), reset)
    assert_close(*judged(result, looped(case)), case.tolerance["float64"])


@EACH
def test_without_state_and_reset(case, algorithm, x64, strict, compiled_quickly):
    inputs, state, reset = make(case)
    run = jax.jit(lambda inputs: case.run(inputs, None, None, **keywords(algorithm)))
    no_reset = np.zeros_like(reset)
    if case.name.startswith("monoid_scan"):  # without a state the first element is the state
        no_reset[:, 0] = True
    elif state is not None:
        state = jax.tree.map(np.zeros_like, state)
    expected = case.oracle(inputs, state, no_reset)
    assert_close(*judged(run(cast(inputs, "float64")), expected), case.tolerance["float64"])


LENGTHS = [65] + [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 63, 64, 1000)]


@pytest.mark.parametrize("length", LENGTHS)
@EACH
def test_float32_at_any_length(case, algorithm, length, strict, request):
    thorough, layer = case.name in THOROUGH, case.layer is not None
    if layer and length not in ((1, 65, 1000) if thorough else (1, 1000)):
        pytest.skip("a layer takes these lengths if its ops do")
    if not thorough and length not in (1, 64, 1000):
        pytest.skip("a row takes these lengths if the thorough rows of its op do")
    # Optimized: 65 steps of the thorough rows, and 1,000 of those without hard inputs, which have a
    # separate, longer test.
    optimized = thorough and (length == 65 or (length == 1000 and case.hard is None))
    if not optimized:
        request.getfixturevalue("compiled_quickly")
    inputs, state, reset = make(case, length=length)
    run = runner(case, algorithm, chunk_size=16)
    result = run(cast(inputs, "float32"), cast(state, "float32"), reset)
    assert_close(*judged(result, looped(case, length)), case.tolerance["float32"])


@EACH
def test_bfloat16_keeps_its_state_in_float32(case, algorithm, strict, compiled_quickly):
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


@by_row()
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


# bfloat16 inputs are rounded before either sees them; its outputs are rounded to 8 bits.
HARD = {"float32": 1e-4, "bfloat16": 2e-2}


@functools.lru_cache(maxsize=4)
def hard_arrays(case, length, dtype):
    """Return hard inputs in a dtype, a state, resets, and the oracle's results."""
    inputs, state, reset = make(case, batch=1, length=length)
    if length > 1000:
        reset = np.zeros_like(reset)  # as far as a state can travel
    inputs = cast(case.hard(np.random.default_rng(1), inputs), dtype)
    seen = jax.tree.map(
        lambda v: np.asarray(v).astype(np.complex128 if np.iscomplexobj(v) else np.float64), inputs
    )
    return inputs, cast(state, "float32"), reset, case.oracle(seen, state, reset)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [100, pytest.param(65536, marks=pytest.mark.slow)])
@by_variant(lambda case: case.hard is not None)
def test_hard_inputs(case, algorithm, length, dtype, strict, request):
    """Check finite values near the float64 loop, at any decay, key and length."""
    if length > 1000 and (case.name not in THOROUGH or algorithm != case.algorithms[0]):
        if dtype == "bfloat16":
            pytest.skip("in float32 the algorithms agree at this length, in bfloat16 at 100")
        if algorithm != case.algorithms[0] and case.name not in THOROUGH:
            pytest.skip("at this length one or two rows of each op run with every algorithm")
    if dtype == "bfloat16" and any(map(np.iscomplexobj, make(case)[0].values())):
        pytest.skip("no complex bfloat16")
    if length < 1000:  # 65,536 steps take longer to run than to optimize
        request.getfixturevalue("compiled_quickly")
    inputs, state, reset, expected = hard_arrays(case, length, dtype)
    result = runner(case, algorithm, chunk_size=16)(inputs, state, reset)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    if case.name.startswith("linear_scan"):
        # The rounding error of a running sum is relative to its largest value, not to its last.
        # The final state is also an output, so it is compared as a part of the outputs.
        result, expected = result[0], expected[0]
    tolerance = HARD[dtype]
    if algorithm == "pallas" and case.name.startswith("linear_scan"):
        # A TPU has no fused multiply-add: each product is rounded, and in the running sums of a
        # decay of 1 - 1e-7 always the same way. Compiled for a CPU the other algorithms have one.
        tolerance *= 2
    assert_close(result, expected, tolerance)


@by_variant(
    lambda case: case.hard is not None,
    variant=wrapped,
    quick={"linear_scan", "selective_scan"},
)
def test_hard_inputs_have_finite_gradients(case, algorithm, strict):
    """Check that float32 and float64 gradients agree, so that no cancellation loses digits."""
    inputs, state, reset = make(case, length=50)
    inputs = cast(case.hard(np.random.default_rng(1), inputs), "float32")
    out, _ = looped(case, 50)
    w_out = cast(weights(out), "float32")
    gradients = runner_with_gradients(case, algorithm)
    narrow = gradients(inputs, cast(state, "float32"), reset, w_out, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(narrow))
    with jax.enable_x64(True), unoptimized():
        wide = gradients(
            cast(inputs, "float64"), cast(state, "float64"), reset, cast(w_out, "float64"), None
        )
        wide = jax.tree.map(np.asarray, wide)
    assert_close(narrow, wide, 1e-4)


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
