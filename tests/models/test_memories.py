"""Memories that learn in mini-batches: the delta rule, lost memories, and bounded storage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.layers import Atlas, Context, Titans, TTTLinear
from seqjax.layers.atlas import newton_schulz
from tests.contract.harness import assert_close, make
from tests.contract.layer_case import layer_case
from tests.oracles import memory_oracles

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_mini_batches_of_one_token_are_the_delta_rule(x64):
    """Check Titans without momentum and forgetting, from zero weights."""
    rng, (batch, length, heads, size) = np.random.default_rng(0), (2, 20, 2, 4)
    layer = Titans(dim=heads * size, heads=heads, mini_batch=1)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, length, heads, size))) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    rate = jnp.asarray(rng.standard_normal((batch, length, heads)))
    never = jnp.full_like(rate, -jnp.finfo(rate.dtype).max)
    tokens = {"q": q, "k": k, "v": v, "rate": rate, "momentum": never, "forget": never}
    reset = jnp.asarray(rng.random((batch, length)) < 0.2)
    params = {"W1": jnp.zeros((heads, size, size))}
    state = layer.memory_state(batch, jnp.float64)
    y, final = layer.scan_memory(params, tokens, state, Context(reset))
    beta = 2 * layer.base_rate * jax.nn.sigmoid(rate)
    wanted, memory = seqjax.delta_rule(q, k, v, beta, reset=reset, scale=1.0)
    np.testing.assert_allclose(y, wanted, atol=1e-12)
    np.testing.assert_allclose(final["change"][0][:, :, 1], memory, atol=1e-12)


def test_recall_checks_its_arguments():
    layer = Titans(dim=4, heads=2)
    params = layer.init(jax.random.key(0))
    x, state = np.ones((1, 2, 4), np.float32), layer.initial_state(1)
    with pytest.raises(ValueError, match=r"^Titans: `state` must be the state to read, got None;"):
        layer.recall(params, x, None)
    with pytest.raises(ValueError, match=r"^Titans: `x` must"):
        layer.recall(params, [[1.0], [2.0, 3.0]], state)


def test_recall_on_an_explicit_mesh():
    """Check the trace alone, in which JAX checks the shardings."""
    layer = Titans(dim=4, heads=2)
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )

    def placed(tree, spec):
        return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

    params = placed(layer.init(jax.random.key(0)), jax.P("model"))
    x, state = placed((np.ones((4, 2, 4), np.float32), layer.initial_state(4)), jax.P("data"))
    y = jax.eval_shape(layer.recall, params, x, state)
    assert y.shape == x.shape
    assert y.sharding.spec[0] == "data"


@pytest.mark.parametrize("hidden", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_recall_reads_without_learning(hidden, x64):
    """Check against the last output of `apply`, which reads the memory after its own write."""
    layer = Titans(dim=8, heads=2, mini_batch=4, hidden=hidden, conv_size=1, base_rate=0.5)
    params = layer.init(jax.random.key(0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 7, 8), jnp.float64)
    y, state = jax.jit(layer.apply)(params, x)
    recalled = jax.jit(layer.recall)(params, x, state)
    np.testing.assert_allclose(recalled[:, -1], y[:, -1], rtol=1e-11)
    assert np.abs(recalled[:, 0] - y[:, 0]).max() > 1e-3


@pytest.mark.slow
def test_newton_schulz_moves_singular_values_to_one(x64):
    """Check the values of both shapes, zero, and the whole layer with five steps."""
    rng = np.random.default_rng(0)
    for shape in ((2, 7, 4), (2, 4, 7)):
        found = np.asarray(newton_schulz(jnp.asarray(rng.standard_normal(shape)), 5))
        values = np.linalg.svd(found, compute_uv=False)
        assert ((values > 0.6) & (values < 1.3)).all()
    assert not np.asarray(newton_schulz(jnp.zeros((3, 3)), 5)).any()
    case = layer_case(Atlas(dim=6, heads=2, window=3), memory_oracles.atlas)
    inputs, _, reset = make(case)
    y, _ = jax.jit(case.run)(inputs, None, reset)
    assert_close(y, case.oracle(inputs, None, reset)[0], 1e-10)


def test_a_memory_that_diverged_recovers_at_a_reset():
    """Check finite inputs whose memory overflows: NaN until the reset, inside a mini-batch."""
    length, where = 42, 38
    layer = Titans(dim=4, heads=1, mini_batch=4, base_rate=1e12, conv_size=1)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, length, 4))
    reset = jnp.zeros((1, length), bool).at[0, where].set(True)
    apply = jax.jit(layer.apply)
    y, state = apply(params, x, None, reset)
    fresh, wanted = apply(params, x[:, where:])
    assert np.isnan(y[:, where - 1]).all()
    np.testing.assert_allclose(y[:, where:], fresh, rtol=1e-5)
    jax.tree.map(lambda s, w: np.testing.assert_allclose(s, w, rtol=1e-5), state, wanted)


@pytest.mark.slow
def test_one_state_per_mini_batch_is_stored():
    """Check the temporaries of a gradient: states of all steps alone would be 35 MB."""
    layer, length = TTTLinear(dim=32, heads=1), 4096
    params = jax.eval_shape(layer.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x)[0] ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    states = 4 * length * sum(a.size for a in jax.tree.leaves(layer.memory_state(1, jnp.float32)))
    assert states > 34e6
    assert compiled.memory_analysis().temp_size_in_bytes < states / 2
