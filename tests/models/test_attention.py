"""Attention: capacity of the cache, blocks of queries, exact angles, bad arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import Attention, _cache
from seqjax.layers._attention import Rotary

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYER = Attention(dim=4, heads=2, capacity=6)


@pytest.fixture(scope="module")
def arguments():
    params = LAYER.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 17, 4))
    reset = jnp.zeros((2, 17), bool).at[0, 4].set(True).at[0, 12].set(True).at[1, 5].set(True)
    return params, x, reset


@pytest.mark.slow
def test_positions_past_the_capacity_are_nan(arguments):
    """Check the same positions in one call, in two, and in steps, and that a reset clears them."""
    params, x, reset = arguments
    roomy = dataclasses.replace(LAYER, capacity=32)
    expected, _ = jax.jit(roomy.apply)(params, x, None, reset)
    position = np.zeros((2, 17), int)
    for t in range(1, 17):
        position[:, t] = np.where(reset[:, t], 0, position[:, t - 1] + 1)
    expected = jnp.where((position >= LAYER.capacity)[..., None], jnp.nan, expected)
    assert jnp.isnan(expected).any()

    apply = jax.jit(LAYER.apply)
    y, state = apply(params, x, None, reset)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for where in (4, 9, 12, 14):
        head, carried = apply(params, x[:, :where], None, reset[:, :where])
        tail, last = apply(params, x[:, where:], carried, reset[:, where:])
        np.testing.assert_allclose(jnp.concatenate([head, tail], 1), expected, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), last, state)
    step, now = jax.jit(LAYER.step), LAYER.initial_state(2)
    for t in range(17):
        y_t, now = step(params, x[:, t], now, reset[:, t])
        np.testing.assert_allclose(y_t, expected[:, t], atol=1e-5)


def test_a_call_that_cannot_fit_is_refused(arguments):
    params, x, _ = arguments
    with pytest.raises(ValueError, match="`x` must have at most capacity=6 positions, got 17"):
        LAYER.apply(params, x)


def test_blocks_of_queries_change_nothing(arguments, monkeypatch):
    params, x, reset = arguments
    layer = dataclasses.replace(LAYER, capacity=20)

    def loss(x):
        y, state = layer.apply(params, x, None, reset)
        return jnp.sum(y**2), (y, state)

    whole = jax.jit(jax.grad(loss, has_aux=True))(x)
    monkeypatch.setattr(_cache, "_BLOCK", 5)
    blocks = jax.jit(jax.grad(lambda x: loss(x), has_aux=True))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocks, whole)


def test_angles_at_large_positions_are_exact():
    rotary = Rotary(64, 1e7)
    positions = np.array([0, 1, 511, 512, 513, 100_001, 262_143])
    found = rotary.at(jnp.asarray(positions), 262_144, jnp.dtype("float32"))
    for got, function in zip(found, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(got, function(rotary.angles(positions)), atol=2e-7)


@pytest.mark.parametrize("window", [None, 5])
def test_a_cache_in_the_dtype_of_the_inputs_changes_nothing(arguments, window):
    params, x, reset = arguments
    x = x.astype(jnp.bfloat16)
    wide = dataclasses.replace(LAYER, capacity=20, window=window)
    narrow = dataclasses.replace(wide, cache_dtype="bfloat16")
    outputs = []
    for layer in (wide, narrow):
        apply = jax.jit(layer.apply)
        head, state = apply(params, x[:, :9], None, reset[:, :9])
        tail, state = apply(params, x[:, 9:], state, reset[:, 9:])
        outputs.append(np.concatenate([head, tail], axis=1).astype(np.float32))
        wanted = layer.cache_dtype or "float32"
        assert state["k"].dtype == state["v"].dtype == jnp.dtype(wanted)
    np.testing.assert_array_equal(*outputs)


def test_an_empty_cache_costs_nothing(arguments):
    """Check that a call without a state equals one with the initial state, at any capacity."""
    params, x, reset = arguments
    small, large = (dataclasses.replace(LAYER, capacity=n) for n in (17, 4096))
    expected, state = jax.jit(large.apply)(params, x, large.initial_state(2), reset)
    y, same = jax.jit(large.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, state)

    def cost(layer):
        outputs = jax.jit(lambda x: layer.apply(params, x)[0])
        return outputs.lower(x).compile().cost_analysis()["flops"]

    assert cost(large) < 1.1 * cost(small)  # the tables of angles differ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int8"}, "`cache_dtype` must be one of 'bfloat16', 'float16', 'float32'"),
        ({"kv_heads": 3}, "`kv_heads` must divide heads=4, got 3"),
        ({"rotary_dim": 3}, "`rotary_dim` must be even and from 0 to head_dim=2, got 3"),
        ({"head_dim": 3}, "`head_dim` must be even for rotary positions, got 3"),
        ({"capacity": 0}, "`capacity` must be an integer >= 1, got 0"),
        ({"window": 0}, "`window` must be an integer >= 1, got 0"),
        (
            {"qk_norm": "layer"},
            "`qk_norm` must be one of 'rms', 'rms_offset', 'rms_all_heads', got 'layer'",
        ),
        ({"rope_base": 1.0}, "`rope_base` must be > 1, got 1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(dim=8, heads=4, **options)
