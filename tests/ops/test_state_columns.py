"""Steps on the columns of a state, against the same steps on the whole state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops.nonlinear import state_columns


def stacked(h, x):
    return jnp.stack([h[:, 1] * x, jnp.tanh(h[:, 0])], axis=-1)


def sliced(h, x):
    y = jnp.stack([h[:, 0], h[:, 1], x], axis=-1)
    return y[:, 1:] * jnp.sum(y[:, :2])


def whole(h, x):
    return jnp.where(h > 0, h, x[:, None] * h[::-1])


@pytest.mark.parametrize("step", [stacked, sliced, whole])
def test_columns_agree_with_the_state(step):
    rng = np.random.default_rng(0)
    h, x = rng.normal(size=(5, 2)), rng.normal(size=5)

    def by_columns(h, x):
        run = state_columns.on_columns(step, h.shape)
        columns = run(state_columns.split_state(h, h.shape), x)
        return state_columns.join_state(columns, h.shape)

    for of in (lambda f: f, jax.jacrev):
        found, wanted = (jax.jit(of(f))(h, x) for f in (by_columns, step))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_many_coupled_numbers_stay_together():
    shape = (5, state_columns.FEW + 1)
    [column] = state_columns.split_state(jnp.ones(shape), shape)
    assert column.shape == shape == state_columns.join_state([column], shape).shape
