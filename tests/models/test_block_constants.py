"""Constants of layers that depend on the index of their block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import HGRN2, Context, LightningAttention
from seqjax.layers._lower_bound import initial_values
from seqjax.layers.lightning import alibi_slopes
from tests.contract.harness import assert_close
from tests.oracles import feature_oracles

pytestmark = pytest.mark.usefixtures("x64", "compiled_quickly")


def draws(layer):
    params = jax.jit(lambda: layer.init(jax.random.key(0), jnp.float64))()
    return jax.tree.map(np.asarray, params), np.random.default_rng(0).standard_normal((2, 7, 4))


@pytest.mark.parametrize("room", [1.0, 0.6])
def test_hgrn2_has_the_lower_bound_of_its_block(room):
    """Check block 2 of 4, which takes half of what the blocks before left above their bound."""
    layer = HGRN2(dim=4, heads=2)
    params, x = draws(layer)

    @jax.jit
    def run(params, x):
        values = {name: room * v for name, v in initial_values(4, jnp.float64).items()}
        context = Context(block=2, depth=4, values=values)
        state = layer.initial_state(2, jnp.float64)
        return layer.forward(params, x, state, context)[0], list(context.values.values())

    y, [left] = run(params, x)
    taken = 1 / 3  # sigmoid(0 - log(4 - 2))
    assert_close(left, np.full((1, 1, 4), room * (1 - taken)), 1e-12)
    bound = 1 - room * (1 - taken)
    assert_close(y, feature_oracles.hgrn2(layer, params, x, bound=bound), 1e-12)


def test_hgrn2_has_finite_gradients_without_a_bound():
    layer = HGRN2(dim=4, heads=2)
    params, x = draws(layer)
    params["forget_proj"] = params["forget_proj"] * 1e3
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(layer.apply(params, x)[0] ** 2)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("slopes", "block", "depth", "expected"),
    [
        ("geometric", 0, 1, [2**-4 * (1 + 1e-5), 2**-8 * (1 + 1e-5)]),
        ("geometric", 3, 4, [2**-4 * 1e-5, 2**-8 * 1e-5]),
        ("linear", 1, 4, [0, 4 * 0.75]),
    ],
)
def test_slopes_of_lightning_attention_shrink_with_depth(slopes, block, depth, expected):
    layer = LightningAttention(dim=4, heads=2, slopes=slopes)
    found = layer._log_decay(Context(block=block, depth=depth), jnp.dtype(jnp.float64))
    np.testing.assert_allclose(-found, expected, atol=1e-12)


def test_slopes_of_any_number_of_heads():
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
