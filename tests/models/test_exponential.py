"""Stabilized recurrences and normalizers: `seqjax.layers._exponential`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.layers import Context
from seqjax.layers._exponential import normalized_attention, stabilize
from tests.contract.harness import assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")
B, T, D = 2, 24, 3


def draw(size):
    """Return log decays of gates in (0, 1), log weights of a size, values and resets."""
    rng = np.random.default_rng(0)
    log_decay = -np.logaddexp(0, -size * rng.standard_normal((B, T, D)))
    log_weight, x = size * rng.standard_normal((B, T, D)), rng.standard_normal((B, T, D))
    reset = rng.random((B, T)) < 0.1
    return log_decay, log_weight, x, reset


def quotient(log_decay, log_weight, x, reset, start=None):
    """Return the stabilized u / n, where n is u for x = 1, and the state."""
    if start is None:
        start = {"m": jnp.full((B, D), -jnp.inf), "u": jnp.zeros((2, B, D))}
    s = stabilize(log_decay, log_weight, start["m"], Context(reset))
    run = functools.partial(seqjax.linear_scan, jnp.exp(s.log_decay), reset=reset)
    (u, u_last), (n, n_last) = (
        run(s.weight * value, before)
        for value, before in ((x, start["u"][0]), (jnp.ones_like(x), start["u"][1]))
    )
    return u / n, {"m": s.last, "u": jnp.stack([u_last, n_last])}


def plain(log_decay, log_weight, x, reset):
    """Return the same quotient from plain exponentials, step by step."""

    def step(state, inputs):
        d, i, x, cut = inputs
        u, n = (jnp.where(cut[:, None], 0, part) for part in state)
        u, n = jnp.exp(d) * u + jnp.exp(i) * x, jnp.exp(d) * n + jnp.exp(i)
        return (u, n), u / n

    rows = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (log_decay, log_weight, x, reset))
    _, y = jax.lax.scan(step, (jnp.zeros((B, D)), jnp.zeros((B, D))), rows)
    return jnp.moveaxis(y, 0, 1)


@pytest.mark.slow
def test_stabilized_recurrence(x64, strict):
    """Check values, a split, first derivatives, second derivatives and forward mode."""
    *arrays, reset = map(jnp.asarray, draw(3.0))
    whole, _ = jax.jit(quotient)(*arrays, reset)
    assert_close(whole, jax.jit(plain)(*arrays, reset), 1e-12)
    first, state = quotient(*(a[:, :7] for a in arrays), reset[:, :7])
    second, _ = quotient(*(a[:, 7:] for a in arrays), reset[:, 7:], state)
    assert_close(np.concatenate([first, second], 1), whole, 1e-12)

    weight = np.random.default_rng(1).standard_normal((B, T, D))

    def loss(run, arrays):
        return jnp.sum(weight * run(*arrays, reset) ** 2)

    along = [np.random.default_rng(2).standard_normal((B, T, D)) for _ in arrays]
    results = []
    for run in (lambda *args: quotient(*args)[0], plain):
        gradient = jax.grad(functools.partial(loss, run))
        results.append(jax.jit(lambda a, g=gradient: jax.jvp(g, (a,), (along,)))(arrays))
    assert_close(*results, 1e-11)


@pytest.mark.slow
def test_gradient_of_the_state(x64, strict):
    """Check the gradient through a split, and that of m_0 at a fixed stabilized state."""
    *arrays, reset = map(jnp.asarray, draw(3.0))

    def in_two(arrays):
        first, state = quotient(*(a[:, :7] for a in arrays), reset[:, :7])
        second, _ = quotient(*(a[:, 7:] for a in arrays), reset[:, 7:], state)
        return jnp.sum(jnp.sin(jnp.concatenate([first, second], 1)))

    def at_once(arrays):
        return jnp.sum(jnp.sin(plain(*arrays, reset)))

    assert_close(jax.jit(jax.grad(in_two))(arrays), jax.jit(jax.grad(at_once))(arrays), 1e-11)

    state = {
        "m": jnp.zeros((B, D)),
        "u": jnp.ones((2, B, D)) * jnp.array([2.0, 1.0])[:, None, None],
    }

    def from_state(m):  # u_0 exp(m_0) is the state that counts
        return jnp.sum(jnp.sin(quotient(*arrays, reset, state | {"m": m})[0]))

    def scaled(m):
        return jnp.sum(jnp.sin(quotient(*arrays, reset, state | {"u": state["u"] * jnp.exp(m)})[0]))

    assert_close(jax.grad(from_state)(state["m"]), jax.grad(scaled)(state["m"]), 1e-11)


@pytest.mark.parametrize("size", [60.0, 400.0])
def test_large_gates_stay_finite(size, strict):
    *arrays, reset = (jnp.asarray(a, jnp.float32 if a.dtype != bool else bool) for a in draw(size))
    s = stabilize(arrays[0], arrays[1], jnp.full((B, D), -jnp.inf), Context(reset))
    assert (s.log_decay <= 1e-4).all()
    assert (s.weight <= 1).all()

    def loss(arrays):
        y = quotient(*arrays, reset)[0]
        return jnp.sum(y**2), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, y)))
    assert (np.abs(y) <= np.abs(arrays[2]).max() * (1 + 1e-6)).all()  # a weighted mean of x


def test_normalizer_is_the_op_on_ones(x64, strict):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, 2, n))) for n in (3, 3, 4))
    decay = -jnp.asarray(rng.random((B, T, 2)))
    reset = jnp.asarray(rng.random((B, T)) < 0.2)
    state = {
        "memory": jnp.asarray(rng.standard_normal((B, 2, 3, 4))),
        "normalizer": jnp.asarray(rng.standard_normal((B, 2, 3))),
    }
    o, n, new = normalized_attention(q, k, v, decay, state, Context(reset))
    wanted, memory = seqjax.linear_attention(q, k, v, decay, state["memory"], reset=reset)
    ones = jnp.ones((B, T, 2, 1))
    sums, normalizer = seqjax.linear_attention(
        q, k, ones, decay, state["normalizer"][..., None], reset=reset
    )
    assert_close((o, n, new["memory"]), (wanted, sums[..., 0], memory), 1e-12)
    assert_close(new["normalizer"], normalizer[..., 0], 1e-12)
