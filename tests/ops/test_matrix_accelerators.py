"""The accelerators' form of the chunked ops, run on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.ops.matrix_state import block_decays, chunk_sizes
from tests.contract.harness import assert_close

B, T, H, K, V = 2, 13, 2, 4, 3


@pytest.fixture
def accelerators_form(monkeypatch):
    monkeypatch.setattr(chunk_sizes, "CPU", chunk_sizes.ACCELERATOR)
    jax.clear_caches()
    yield
    jax.clear_caches()


def arrays(op, decay):
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal((B, T, H, K)) / 2 for name in ("q", "k")}
    made["v"] = rng.standard_normal((B, T, H, V))
    made = {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}
    if op == "delta_rule":
        made["beta"] = jnp.asarray(rng.uniform(0, 1, (B, T, H)), jnp.float32)
    if decay is not None:
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        made["log_decay"] = jnp.asarray(-rng.uniform(0, 1, shape), jnp.float32)
    return made


def test_decays_by_level():
    """Compare values and derivatives of both forms, with resets and strong decays."""
    rng = np.random.default_rng(0)
    g = -rng.uniform(0, 2, (3, 16)).astype(np.float32)
    g[0, [0, 5, 6]], g[1, 3::4], g[2, 7] = -np.inf, -30.0, -np.inf
    weights = rng.standard_normal((3, 16, 16)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(by_level, g):
        def total(g):
            made = block_decays.between(g, by_level=by_level)
            return jnp.sum(weights * made), made

        return jax.grad(total, has_aux=True)(g)

    found, expected = both(True, g), both(False, g)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)
    assert (found[1][0, 6:, :6] == 0).all()


CASES = [
    (op, decay) for op in ("linear_attention", "delta_rule") for decay in (None, "head", "channel")
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "decay"), CASES)
def test_resets_and_states_that_are_not_finite(op, decay, accelerators_form):
    """Compare with steps: values, gradients, and where a NaN of the initial state goes."""
    given, rng = arrays(op, decay), np.random.default_rng(1)
    state = jnp.asarray(rng.standard_normal((B, H, K, V)), jnp.float32)
    reset = np.zeros((B, T), bool)
    reset[0, [0, 5, 6]] = reset[1, 7] = True
    run = functools.partial(getattr(seqjax, op), reset=reset, chunk_size=2)

    def results(algorithm, state):
        def total(given, state):
            out, final = run(**given, initial_state=state, algorithm=algorithm)
            after = jnp.where(reset.cumsum(1)[..., None, None] > 0, out, 0)
            return jnp.sum(jnp.sin(after)) + jnp.sum(jnp.cos(final)), (out, final)

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(given, state)

    found, expected = results("chunked", state), results("sequential", state)
    assert_close(found, expected, 2e-5)
    spoiled = state.at[0, 0, 1, 2].set(jnp.nan).at[1, 1, 0, 0].set(jnp.inf)
    # The first sequence is cleared before its first step, the second at step 7.
    gradients, (out, final) = results("chunked", spoiled)
    assert np.isfinite(final).all()
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[1, 7:]).all()
    assert not np.isfinite(out[1, 0, 1]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
