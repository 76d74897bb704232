"""Rematerialization policies of users: the names of outputs and residuals of the ops."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

import seqjax

SAVED = jax.checkpoint_policies.save_only_these_names(*seqjax.ops.CHECKPOINT_NAMES)


def loops(jaxpr):
    """Count the scans of a program, with those of its inner programs."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "scan"
        count += sum(map(loops, jax.extend.core.jaxprs_in_params(equation.params)))
    return count


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "selective_scan"])
def test_a_policy_that_saves_the_names_runs_an_op_once(op):
    x = jnp.ones((1, 40, 1, 2))
    args = [x, x, x] + ([x[..., 0]] if op == "delta_rule" else [])
    if op == "selective_scan":
        args = [
            x[:, :, 0],
            x[:, :, 0],
            -jnp.ones((2, 3)),
            jnp.ones((1, 40, 3)),
            jnp.ones((1, 40, 3)),
        ]
    run = functools.partial(getattr(seqjax, op), algorithm="sequential", implementation="xla")

    def loss(*args):
        return jnp.sum(jnp.sin(run(*args)[0]))

    def count(function):
        return loops(jax.make_jaxpr(jax.grad(function))(*args).jaxpr)

    once = count(loss)
    assert count(jax.checkpoint(loss, policy=SAVED)) == once
    assert count(jax.checkpoint(loss)) > once
