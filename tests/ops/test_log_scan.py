"""`log_scan`: values of -inf anywhere, their derivatives, and the choice of a maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.oracles import op_oracles

pytestmark = pytest.mark.usefixtures("compiled_quickly")
B, T, D = 2, 12, 3


def draw():
    """Return log decays, inputs and a state, about half of them -inf, and resets."""
    rng = np.random.default_rng(0)

    def logarithms(*shape):
        return np.where(rng.random(shape) < 0.5, -np.inf, rng.standard_normal(shape))

    d, x, h = logarithms(B, T, D), logarithms(B, T, D), logarithms(B, D)
    x[0, :4], h[0] = -np.inf, -np.inf  # a state that stays at -inf for several steps
    return d, x, h, rng.random((B, T)) < 0.2


@pytest.mark.parametrize("algorithm", ["sequential", "associative", "chunked"])
@pytest.mark.parametrize("semiring", ["log", "max"])
def test_infinite_logarithms(semiring, algorithm, x64, strict):
    """Compare values with the loop, gradients with those of numbers that are nearly zero."""
    d, x, h, reset = draw()
    weight = np.random.default_rng(1).standard_normal((B, T, D))

    @jax.jit
    def run(d, x, h):
        return seqjax.log_scan(d, x, h, semiring=semiring, reset=reset, algorithm=algorithm)

    @jax.jit
    def gradients(d, x, h, finite):
        def loss(d, x, h):
            return jnp.sum(jnp.where(finite, weight * run(d, x, h)[0], 0))

        first = jax.grad(loss, argnums=(0, 1, 2))
        second = jax.jvp(first, (d, x, h), jax.tree.map(jnp.ones_like, (d, x, h)))[1]
        return first(d, x, h), second

    y, final = run(d, x, h)
    with np.errstate(invalid="ignore"):
        expected, last = op_oracles.log_scan({"log_decay": d, "x": x}, h, reset, semiring)
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(final, last, rtol=1e-12)
    found = gradients(d, x, h, np.isfinite(expected))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    near = (np.maximum(a, -800.0) for a in (d, x, h))
    wanted, _ = gradients(*near, np.isfinite(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found[0], wanted)


def test_equal_arguments_of_the_maximum_share_the_gradient(x64):
    x = jnp.array([[[2.0], [2.0]]])
    gradient = jax.grad(lambda x: seqjax.log_scan(None, x, semiring="max")[1].sum())(x)
    assert gradient.ravel().tolist() == [0.5, 0.5]


def test_unknown_semiring():
    with pytest.raises(ValueError, match=r"^log_scan: `semiring` must be one of log, max, got 'm"):
        seqjax.log_scan(None, jnp.ones((1, 2, 3)), semiring="min")
