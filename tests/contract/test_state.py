"""Contract: state, reset, causality. Carried states, cleared states, and no leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.harness import (
    ROWS,
    THOROUGH,
    VARIANTS,
    T,
    assert_close,
    assert_same_bits,
    by_row,
    by_variant,
    cast,
    copied,
    cut,
    make,
    runner,
    runner_with_gradients,
    state_weights,
    weights,
)

EACH = by_variant(lambda case: getattr(case.layer, "causal", True))


def in_time(case, tree, start, stop):
    """Return steps start..stop of a tree of outputs, counted in the recurrence's direction."""
    if case.reverse:
        start, stop = T - stop, T - start
    return jax.tree.map(lambda y: y[:, start:stop], tree)


@EACH
def test_split_and_resume(case, algorithm, x64, strict, compiled_quickly):
    """Split inside a chunk, and the thorough rows also between two.

    The parts of the other rows have the length that all tests compile.
    """
    length, places = (T, (5, T - 5)) if case.name in THOROUGH else (2 * T, (T,))
    inputs, state, reset = make(case, length=length)
    inputs, state = cast(inputs, "float64"), cast(state, "float64")
    run = runner(case, algorithm)
    whole, final = run(inputs, state, reset)
    for where in places:
        bounds = [(0, where), (where, length)]
        if case.reverse:
            bounds.reverse()
        parts, carried = {}, state
        for start, stop in bounds:
            part = cut(case, inputs, start, stop), carried, reset[:, start:stop]
            parts[start], carried = run(*part)
        joined = jax.tree.map(lambda *ys: np.concatenate(ys, axis=1), parts[0], parts[where])
        assert_close((joined, carried), (whole, final), 1e-12)


@by_row(lambda case: case.layer is not None and case.layer.causal)
def test_step_agrees_with_apply(case, x64, strict):
    inputs, _, reset = make(case)
    inputs = cast(inputs, "float64")
    whole, final = runner(case, None)(inputs, None, reset)
    step = jax.jit(case.layer.step)
    state = case.layer.initial_state(reset.shape[0], "float64")
    outputs = []
    for t in range(T):
        y, state = step(inputs["params"], inputs["x"][:, t], state, reset[:, t])
        outputs.append(y)
    assert_close((np.stack(outputs, axis=1), state), (whole, final), 1e-11)


@EACH
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
def test_nothing_crosses_a_reset(case, algorithm, poison, x64, strict, compiled_quickly):
    """Check that no non-finite input before a reset changes values or gradients after it."""
    inputs, state, reset = make(case)
    where = 6
    reset = np.zeros_like(reset)
    reset[:, T - 1 - where if case.reverse else where] = True
    before = slice(T - where, T) if case.reverse else slice(0, where)
    after = slice(0, T - where) if case.reverse else slice(where, T)
    spoiled = copied(case, inputs)
    for name in case.timed + case.shared:
        case.in_time(name, spoiled[name], before)[...] = poison
    spoiled_state = jax.tree.map(lambda s: np.full_like(s, poison), state)
    run = runner(case, algorithm)
    results, gradients = [], []
    for data, start in ((inputs, state), (spoiled, spoiled_state)):
        data, start = cast(data, "float64"), cast(start, "float64")
        out, final = run(data, start, reset)
        results.append((in_time(case, out, where, T), final))
        w = weights(out)
        for leaf in jax.tree.leaves(w):
            leaf[:, before] = 0
        w_final = state_weights(case, final)
        grads, _ = runner_with_gradients(case, algorithm)(data, start, reset, w, w_final)
        gradients.append({k: case.in_time(k, grads[k], after) for k in case.timed + case.shared})
    assert_close(results[1], results[0], 1e-12)
    assert_close(gradients[1], gradients[0], 1e-12)


@EACH
def test_a_cleared_state_leaves_no_trace(case, algorithm, x64, strict, compiled_quickly):
    """Check that a NaN state, reset before the first step, does not reach any gradient."""
    inputs, state, reset = make(case)
    inputs = cast(inputs, "float64")
    reset[:, -1 if case.reverse else 0] = True
    if case.layer is None:
        state = cast(state, "float64")
    else:
        state = case.layer.initial_state(reset.shape[0], "float64")
    spoiled = jax.tree.map(
        lambda s: jnp.full_like(s, np.nan) if jnp.issubdtype(s.dtype, jnp.inexact) else s, state
    )
    run = runner(case, algorithm)
    clean = run(inputs, state, reset)
    assert_same_bits(run(inputs, spoiled, reset), clean)
    gradient = functools.partial(runner_with_gradients(case, algorithm), inputs)
    w = weights(clean[0]), state_weights(case, clean[1])
    assert_same_bits(gradient(spoiled, reset, *w)[0], gradient(state, reset, *w)[0])


@EACH
def test_causal_to_the_bit(case, algorithm, x64, strict):
    inputs, state, reset = make(case)
    state = cast(state, "float64")
    run = runner(case, algorithm)
    whole, _ = run(cast(inputs, "float64"), state, reset)
    other, _, other_reset = make(case, seed=1)
    for where in (1, 4, 7, T - 1):
        later = slice(0, T - where) if case.reverse else slice(where, T)
        changed = copied(case, inputs)
        for name in case.timed + case.shared:
            case.in_time(name, changed[name], later)[...] = case.in_time(name, other[name], later)
        changed_reset = reset.copy()
        changed_reset[:, later] = other_reset[:, later]
        out, _ = run(cast(changed, "float64"), state, changed_reset)
        assert_same_bits(in_time(case, out, 0, where), in_time(case, whole, 0, where))
        assert any(
            (np.asarray(a) != np.asarray(b)).any()
            for a, b in zip(
                jax.tree.leaves(in_time(case, out, where, T)),
                jax.tree.leaves(in_time(case, whole, where, T)),
                strict=True,
            )
        )


@EACH
def test_batch_rows_do_not_meet(case, algorithm, x64, strict):
    inputs, state, reset = make(case)
    run = runner(case, algorithm)
    whole, _ = run(cast(inputs, "float64"), cast(state, "float64"), reset)
    spoiled = copied(case, inputs)
    for name in case.timed:
        spoiled[name][1] = np.nan
    out, _ = run(cast(spoiled, "float64"), cast(state, "float64"), reset)
    assert_same_bits(jax.tree.map(lambda y: y[0], out), jax.tree.map(lambda y: y[0], whole))


def test_every_row_is_held_against_the_oracle():
    names = [str(case) for case, _ in VARIANTS]
    assert len(set(names)) == len(ROWS)
