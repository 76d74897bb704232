"""Feature maps of linear attention without a row in the contract tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import (
    Based,
    DeltaNet,
    LightningAttention,
    LinearAttention,
    Mamba2,
    _feature_maps,
)
from tests.contract.harness import assert_close
from tests.oracles import attention_oracles, feature_oracles

pytestmark = pytest.mark.usefixtures("x64", "compiled_quickly")


def compare(layer, oracle):
    params = jax.tree.map(np.asarray, jax.jit(lambda: layer.init(jax.random.key(0), jnp.float64))())
    x = np.random.default_rng(0).standard_normal((2, 7, layer.dim))
    assert_close(jax.jit(layer.apply)(params, x)[0], oracle(layer, params, x), 1e-11)


@pytest.mark.parametrize(
    ("feature_map", "normalizer"),
    [("relu", "sum"), ("softmax", "sum"), ("dpfp", "sum"), ("identity", "rms"), ("elu", None)],
)
def test_linear_attention(feature_map, normalizer):
    layer = LinearAttention(
        dim=6, heads=2, feature_map=feature_map, normalizer=normalizer, map_order=2
    )
    compare(layer, feature_oracles.linear_attention)


def test_a_fast_weight_programmer_with_elu():
    compare(DeltaNet(dim=6, heads=2, feature_map="elu"), attention_oracles.deltanet)


def test_features_of_the_performer_approximate_the_exponential():
    rng = np.random.default_rng(0)
    q, k = 0.7 * rng.standard_normal((2, 200, 4))
    phi_q, phi_k = (
        np.asarray(_feature_maps.features("performer", jnp.asarray(z), order=4096)) for z in (q, k)
    )
    expected = np.exp(np.sum(q * k, axis=1) / 2)
    assert np.mean(np.abs(np.sum(phi_q * phi_k, axis=1) / expected - 1)) < 0.05


def test_sums_of_features_may_be_zero():
    """Check signs that alternate, for which all products of neighbors are zero."""
    made = _feature_maps.sum_normalize(
        _feature_maps.features("dpfp", jnp.array([1.0, -1.0, 1.0]), order=1)
    )
    np.testing.assert_array_equal(made, np.zeros(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAttention(4, 2, feature_map="identity"), "positive features"),
        (lambda: LinearAttention(4, 2, feature_map="cosine"), "`feature_map` must be one of"),
        (lambda: LinearAttention(4, 2, expand_v=0.3), "`expand_v` must give an integer"),
        (lambda: Based(6, 4), "`dim` must be a multiple of `heads`"),
        (lambda: DeltaNet(4, heads=2, value_heads=3), "`value_heads` must be a multiple"),
        (lambda: Mamba2(4), "`expand` \\* dim must be a multiple of head_dim"),
        (lambda: Mamba2(4, head_dim=4, groups=3), "`groups` must divide the number of heads, 2"),
        (lambda: Mamba2(4, head_dim=4, dt_limit=(1, 0)), "`dt_limit` must be"),
        (lambda: LightningAttention(4, 2, slopes="steep"), "`slopes` must be one of"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
