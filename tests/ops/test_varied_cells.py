"""Cells that move, share and repeat values in many ways, against a plain `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

import seqjax
from seqjax.ops.nonlinear import hoisted_scan

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Cells take params [3, D], a state [D, 2] and inputs [3, D].


def stacks_of_whole_states(p, h, x):
    return jnp.tanh(jnp.stack([h, h], axis=1)[:, 0] * p[0][:, None] + x[0][:, None])


def concatenates_and_splits(p, h, x):
    left, right = jnp.split(jnp.concatenate([h, x[:2].T], axis=1)[:, 1:], [1], axis=1)
    gates = jnp.split(x + p, 3, axis=0)
    return jnp.concatenate([jnp.tanh(left * gates[0].T + right[:, :1]), right[:, 1:]], axis=1)


def transposes_and_reshapes(p, h, x):
    gates, rows = (x + p).reshape(4, 3).T, h.reshape(-1)[::-1].reshape(2, 4)
    return jnp.tanh(jnp.stack([rows[1] * gates[0], rows[0] + gates[2]], axis=0).T)


def selects_rows(p, h, x):
    swapped = jnp.stack([h[:, 1], h[:, 0] * p[0]], axis=1)
    moved = jnp.concatenate([swapped[1:], swapped[:1]])
    return jnp.where(x[0][:, None] > 0, jnp.tanh(moved), jnp.where(h > 0, h * 0.5, swapped))


def slices_of_nothing(p, h, x):
    y = jnp.stack([h[:, 0] + x[0], h[:, 1] * p[0], x[1]], axis=1)
    return jnp.tanh(jnp.concatenate([y[:, :0], y[:, :1], y[:, 3:], y[:, 2:]], axis=1))


def slices_of_broadcast_sums(p, h, x):
    gates, y = x * p[:, :1] + p[:1], x * x[:, 1:2]
    return jnp.tanh(jnp.stack([h[:, 0] * gates[0] + y[1], h[:, 1] - gates[2] * y[0]], axis=1))


def shared_terms(p, h, x):
    y = (x + p) * (x + p)
    a, b = y[0] - (2 * x)[1], y[0] * -x[1]
    return jnp.stack([jnp.tanh(a * h[:, 0] + b), jnp.tanh(y[2] * h[:, 1] + a)], axis=1)


def powers(p, h, x, n=7):
    """Return the next state from slices of a polynomial of degree 2^n."""
    x = x / 2
    for _ in range(n):
        x = x * x + 0.1 * p
    return jnp.tanh(jnp.stack([h[:, 0] + x[0], h[:, 1] * x[1] + x[2]], axis=1))


def chebyshev(p, h, x, n=7):
    """Return the next state from a Chebyshev polynomial of the input."""
    x = x / 3
    a, b = p, x
    for _ in range(n):
        a, b = b, 2 * x * b - a
    return jnp.tanh(jnp.stack([h[:, 0] + b[0], h[:, 1] + b[1]], axis=1))


CELLS = [
    stacks_of_whole_states,
    concatenates_and_splits,
    transposes_and_reshapes,
    selects_rows,
    slices_of_nothing,
    slices_of_broadcast_sums,
    shared_terms,
    powers,
    chebyshev,
]


def arguments():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in ((3, 4), (2, 4, 3, 4), (2, 4, 2))]


def by_scan(cell, p, xs, h0, reset):
    def one(xs, h0, reset):
        def step(h, inputs):
            x, cut = inputs
            return (h := cell(p, jnp.where(cut, 0.0, h), x)), h

        return lax.scan(step, h0, (xs, reset))[1]

    return jax.vmap(one)(xs, h0, reset)


@pytest.mark.quick("stacks_of_whole_states", "slices_of_broadcast_sums", "shared_terms")
@pytest.mark.parametrize("cell", CELLS)
def test_states_and_gradients_are_those_of_a_plain_scan(cell, x64):
    args, reset = arguments(), np.array([[0, 0, 1, 0], [1, 0, 0, 0]], bool)
    ct = np.random.default_rng(1).normal(size=(2, 4, 4, 2))

    def ours(p, xs, h0):
        return seqjax.nonlinear_scan(cell, p, xs, h0, reset=reset, algorithm="sequential")[0]

    def all_of(run, *args):
        states, vjp = jax.vjp(run, *args)
        return states, *vjp(ct)

    def plain(p, xs, h0):
        return by_scan(cell, p, xs, h0, reset)

    both = jax.jit(lambda *args: [all_of(run, *args) for run in (ours, plain)])
    for found, wanted in zip(*both(*args), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def count(program):
    """Return the number of operations of a program, and the largest of those of its loops."""
    operations = loop = 0
    for eqn in program.eqns:
        inner = [count(getattr(p, "jaxpr", p)) for p in jaxprs_in_params(eqn.params)]
        operations += 1 + sum(n for n, _ in inner)
        is_loop = eqn.primitive.name in ("scan", "while")
        loop = max([loop, *(n if is_loop else most for n, most in inner)])
    return operations, loop


@pytest.mark.parametrize("cell", [powers, chebyshev])
def test_long_chains_of_cheap_operations_are_traced_once(cell):
    """Check the number of operations: without a limit it grows exponentially."""

    def operations(n):
        def run(*args):
            def step(h, x):
                return (h := cell(args[0], h, x, n)), h

            return hoisted_scan.hoisted_scan(step, args[2], args[1])

        return count(jax.make_jaxpr(run)(*arguments()).jaxpr)

    (short, loop), (long, same) = operations(20), operations(40)
    assert long < 2 * short
    assert same == loop
