"""Sums in the gradients of the matrix-state ops have operands of at most six axes.

On CPU, jaxlib 0.10.2 and 0.11.0 write outside the arrays in a sum of products with seven or more
axes, one of them of size 1 (jax issues 39257 and 40412). `jax.vmap` adds axes.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import seqjax

B, T, H, K = 1, 130, 4, 32  # three chunks


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "generalized_delta_rule"])
@pytest.mark.parametrize("groups", [2, H])
def test_sums_have_few_axes(op, groups):
    """Decays per channel and shared keys have the most axes."""
    q, v = jnp.ones((B, T, groups, K)), jnp.ones((B, T, H, K))
    inputs = {"q": q, "k": q, "v": v, "log_decay": -v}
    if op == "delta_rule":
        inputs["beta"] = v[..., 0]
    if op == "generalized_delta_rule":
        inputs |= {"a": q, "b": -q}

    def loss(inputs):
        return getattr(seqjax, op)(**inputs, algorithm="chunked")[0].sum()

    program = jax.jit(jax.grad(loss)).lower(inputs).as_text()
    pattern = r"stablehlo\.reduce\(.* dimensions = \[([\d, ]+)\] : \(tensor<([\dx]+)x\w+>"
    sums = [
        (axes, shape)
        for axes, shape in re.findall(pattern, program)
        if any(shape.split("x")[int(axis)] != "1" for axis in axes.split(","))
    ]
    assert sums
    assert not [shape for _, shape in sums if len(shape.split("x")) > 6]
