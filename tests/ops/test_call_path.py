"""Limits on the length of the call paths of ops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import seqjax
from tests.ops.call_path import count_calls


def _delta_rule(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    return seqjax.delta_rule(q, k, v, beta)[0].sum()


def _linear_scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    return seqjax.linear_scan(decay, x)[0].sum()


FEATURES = (jnp.ones((2, 16, 4)),) * 2
HEADS = (jnp.ones((2, 16, 2, 4)),) * 3 + (jnp.ones((2, 16, 2)),)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the limits are those of a CPU")
@pytest.mark.parametrize(
    ("function", "args", "calls", "changes"),
    [
        pytest.param(seqjax.linear_scan, FEATURES, 125, 22, id="linear_scan"),
        pytest.param(
            jax.grad(_linear_scan, range(2)), FEATURES, 230, 60, id="linear_scan gradient"
        ),
        pytest.param(jax.grad(_delta_rule, range(4)), HEADS, 620, 130, id="delta_rule gradient"),
    ],
)
def test_call_path(
    function: Callable[..., Any], args: tuple[jax.Array, ...], calls: int, changes: int
) -> None:
    """Check that the first call stays within the limits of calls and of changes of file."""
    made, changed = count_calls(function, *args)
    assert made <= calls, f"{made} calls, at most {calls}"
    assert changed <= changes, f"{changed} changes of file, at most {changes}"
