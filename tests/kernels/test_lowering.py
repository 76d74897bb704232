"""Lowering of kernels: 64-bit types, and the precision of products."""

import jax
import jax.numpy as jnp
import pytest

import seqjax
from seqjax.cells import GRU


def ones(*shape):
    return jnp.ones(shape, "float32")


_VECTOR, _HEADS = (1, 16, 128), (1, 64, 2, 128)
_GRU = GRU(8)
KERNELS = {
    "linear_scan": (seqjax.linear_scan, [_VECTOR] * 2),
    "selective_scan": (seqjax.selective_scan, [_VECTOR] * 2 + [(128, 4)] + [(1, 16, 4)] * 2),
    "linear_attention": (seqjax.linear_attention, [_HEADS] * 3),
    "delta_rule": (seqjax.delta_rule, [_HEADS] * 3 + [_HEADS[:3]]),
    "generalized_delta_rule": (seqjax.generalized_delta_rule, [_HEADS] * 6),
    "nonlinear_scan": (
        lambda xs, state, *params, **keywords: seqjax.nonlinear_scan(
            _GRU, dict(zip(_GRU.recurrent, params, strict=True)), xs, state, **keywords
        )[:2],
        [(2, 16, 3, 8), (2, 8), *map(_GRU.param_shape, _GRU.recurrent)],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_for_tpu_lower_with_64_bit_types(name, x64):
    """Lower float32 arrays for TPU, where Python numbers would be 64-bit."""
    op, shapes = KERNELS[name]

    def loss(*args):
        return sum(jnp.sum(y) for y in op(*args, implementation="pallas"))

    args = [ones(*shape) for shape in shapes]
    program = jax.jit(jax.grad(loss, argnums=tuple(range(len(args))))).trace(*args)
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2


def tanh(W, h, x):
    return jnp.tanh(h @ W + x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (seqjax.linear_attention, [(1, 16, 2, 8)] * 3),
        (
            lambda *args: seqjax.nonlinear_scan(tanh, *args, interpret=True),
            [(4, 4), (1, 3, 4), (1, 4)],
        ),
    ],
    ids=["linear_attention", "nonlinear_scan"],
)
def test_the_precision_around_an_op_is_that_of_its_products(op, shapes):
    """Set the precision inside `jit`, forward and backward: lowering comes after it."""

    def loss(*args):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(op(*args)[0])

    args = [ones(*shape) for shape in shapes]
    for function in (loss, jax.grad(loss)):
        text = jax.jit(function).lower(*args).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
