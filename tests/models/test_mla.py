"""MLA: keys without a shared part, capacity of the cache, bad arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import MLA
from tests.oracles import latent_oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYER = MLA(dim=4, heads=2, kv_rank=3, head_dim=2, capacity=6)


@pytest.mark.quick("layer0")
@pytest.mark.parametrize("layer", [LAYER, dataclasses.replace(LAYER, rotary_dim=2)])
def test_positions_past_the_capacity_are_nan(layer):
    """Check one call, pieces and steps against the oracle, and NaN where the cache is full."""
    rng = np.random.default_rng(0)
    params = layer.init(jax.random.key(0))
    x = jnp.asarray(rng.standard_normal((2, 11, 4)), jnp.float32)
    reset = np.zeros((2, 11), bool)
    reset[0, 5] = reset[1, 3] = True
    want = latent_oracles.mla(layer, params, x, reset)
    want[1, 9:] = np.nan  # six positions after the reset
    apply, step, state = jax.jit(layer.apply), jax.jit(layer.step), layer.initial_state(2)
    y, last = apply(params, x, None, reset)
    np.testing.assert_allclose(y, want, atol=1e-5)
    head, carried = apply(params, x[:, :4], None, reset[:, :4])
    tail, _ = apply(params, x[:, 4:], carried, reset[:, 4:])
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), want, atol=1e-5)
    for t in range(11):
        y_t, state = step(params, x[:, t], state, reset[:, t])
        np.testing.assert_allclose(y_t, want[:, t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)
    assert state["latent"].shape == (2, 6, 3 + layer.rotary_dim)
    with pytest.raises(ValueError, match="`x` must have at most capacity=6 positions, got 11"):
        layer.apply(params, x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 3}, "`rotary_dim` must be >= 0, and even with a rope_base, got 3"),
        ({"rope_base": 1.0}, "`rope_base` must be > 1 or None, got 1.0"),
        ({"kv_rank": 0}, "`kv_rank` must be"),
        ({"q_rank": 0}, "`q_rank` must be"),
        ({"norm_eps": 0.0}, "`norm_eps` must be > 0"),
    ],
)
def test_bad_arguments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYER, **fields)
