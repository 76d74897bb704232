"""The optimizer and its schedule."""

import numpy as np
import pytest

pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

from experiments.configs import lm
from experiments.training import optimizer


def test_the_optimizer_follows_the_roles():
    config = lm.get_config("lru").optimizer
    config.update(weight_decay=0.5, recurrence_rate=0.25, warmup_steps=1, clip_norm=0.0)
    roles = {"w": "weight", "b": "bias", "n": "norm", "e": "embedding", "r": "recurrence"}
    params = {name: jnp.ones(3) for name in roles}
    transform = optimizer.make_optimizer(config, 100, roles)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zero, transform.init(params), params)
    assert float(updates["w"][0]) < 0
    assert all(float(updates[name][0]) == 0 for name in "bner")
    one = jax.tree.map(jnp.ones_like, params)
    updates, _ = transform.update(one, transform.init(params), params)
    assert float(updates["r"][0] / updates["b"][0]) == pytest.approx(0.25)


def test_the_schedule_warms_up_and_goes_down():
    config = lm.get_config("lru").optimizer
    rates = np.array([optimizer.make_schedule(config, 1000)(step) for step in range(1001)])
    assert 0 < rates[0] < rates[10] < rates[config.warmup_steps]
    assert rates.max() == pytest.approx(config.learning_rate)
    assert rates[-1] == pytest.approx(config.learning_rate * config.final_fraction)
    assert (np.diff(rates[config.warmup_steps :]) <= 0).all()
    assert isinstance(optimizer.make_schedule(config, 1)(0), (float, jax.Array))
