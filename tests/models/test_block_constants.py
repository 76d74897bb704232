"""Constants of layers that depend on the index of their block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import HGRN2, Context, LightningAttention
from seqjax.layers._lower_bound import names
from seqjax.layers.lightning import alibi_slopes
from tests.contract.harness import assert_close
from tests.oracles import feature_oracles

pytestmark = pytest.mark.usefixtures("x64", "compiled_quickly")


def draws(layer):
    params = jax.jit(lambda: layer.init(jax.random.key(0), jnp.float64))()
    return jax.tree.map(np.asarray, params), np.random.default_rng(0).standard_normal((2, 7, 4))


def test_hgrn2_has_the_lower_bound_of_its_block():
    """Check the third of four blocks."""
    layer = HGRN2(dim=4, heads=2)
    params, x = draws(layer)
    rows, count = names(4)
    logits = np.random.default_rng(1).standard_normal((4, 4))

    @jax.jit
    def run(params, x):
        context = Context(values={rows: jnp.asarray(logits), count: jnp.int32(2)})
        state = layer.initial_state(2, jnp.float64)
        return layer.forward(params, x, state, context)[0], context.values[count]

    y, blocks = run(params, x)
    assert blocks == 3
    bound = (np.exp(logits) / np.exp(logits).sum(0))[1:3].sum(0)
    by_head = bound.reshape(1, 1, 4)
    assert_close(y, feature_oracles.hgrn2(layer, params, x, bound=by_head), 1e-12)


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
