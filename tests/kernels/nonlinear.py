"""Arrays and cells that the tests of nonlinear kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.cases import cell_params

INTERPRETED, SEQUENTIAL = {"interpret": True}, {"algorithm": "sequential"}


def narrow(array, dtype="float32"):
    """Cast to a dtype; integers stay unchanged."""
    return jnp.asarray(array, "int32" if array.dtype == "int32" else dtype)


def arrays(cell, batch, length, dtype="float32", scale=1.0):
    """Return parameters, inputs, state and resets, and cotangents of all states and the last."""
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((batch, length, cell.gates, cell.dim))
    # sLSTM divides by a number of its state, so it starts from a state that its steps can reach.
    state = np.asarray(cell.initial_state(batch))
    if cell.width < 4:
        state = rng.uniform(-0.9, 0.9, state.shape)
    cts = rng.standard_normal((batch, length, *state.shape[1:])), rng.standard_normal(state.shape)
    given = jax.tree.map(narrow, (cell_params(rng, cell, scale), state))
    reset = jnp.asarray(rng.random((batch, length)) < 0.2)
    return given[0], narrow(xs, dtype), given[1], reset, (narrow(cts[0], dtype), narrow(cts[1]))


def pulled(cell, params, xs, state, reset, cts, **keywords):
    """Return states and gradients."""

    def run(params, xs, state):
        return seqjax.nonlinear_scan(cell, params, xs, state, reset=reset, **keywords)[:2]

    def both(*args):
        out, pull = jax.vjp(run, *args)
        return out, pull(cts)

    return jax.jit(both)(params, xs, state)


def several(params, h, x):
    """Multiply with matrices on both sides, several rows at once, and one matrix twice."""
    both = h.T @ params["W"]  # [2, D]
    first = jnp.tanh(params["V"] @ h[:, 0] + jax.nn.softplus(params["scale"]) * x["u"])
    kept = jnp.where(x["keep"] > 0, first, both[1] @ params["W"])
    return jnp.stack([kept, jax.nn.sigmoid(both[0]) * h[:, 1]], axis=1)


def several_pulled(channels, **keywords):
    """Return a loss of the cell `several`, and its gradients."""
    rng = np.random.default_rng(0)
    scale = 0.6 * channels**-0.5
    params = {name: scale * rng.standard_normal((channels, channels)) for name in "WV"}
    params["scale"] = rng.standard_normal(())
    keep = rng.integers(0, 2, (2, 6, channels), "int32")
    xs = {"u": rng.standard_normal((2, 6, channels)), "keep": keep}
    params, xs, state = jax.tree.map(narrow, (params, xs, rng.standard_normal((2, channels, 2))))

    def loss(params, u, state):
        inputs = {"u": u, "keep": xs["keep"]}
        hs, final, _ = seqjax.nonlinear_scan(several, params, inputs, state, **keywords)
        return jnp.sum(jnp.sin(hs)) + jnp.sum(final**2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, xs["u"], state)
