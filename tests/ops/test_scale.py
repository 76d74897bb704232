"""The `scale` of the matrix-state ops: an operand, and not a constant of the compiled program."""

import contextlib
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.contract.cases import OPS
from tests.contract.harness import assert_close, by_row, cast, make

NAMES = ("linear_attention-scalar", "delta_rule-channel", "generalized_delta_rule")
CASES = [case for case in OPS if case.name in NAMES]
EACH = pytest.mark.parametrize("case", CASES, ids=str)
KERNEL = {"implementation": "pallas", "interpret": True}


def made(case, dtype):
    inputs, state, reset = make(case)
    return cast(inputs, dtype), cast(state, dtype), jnp.asarray(reset)


@contextlib.contextmanager
def checking_leaks():
    """Run `jax.checking_leaks` with the existing objects hidden from the garbage collector.

    The check collects garbage after every trace. In a process with many compiled programs that
    takes minutes.
    """
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


@pytest.mark.quick("linear_attention-scalar")
@by_row(lambda case: case.layer is None)
def test_no_traced_value_is_left_in_a_gradient(case):
    """Check that the functions inside a primitive close over no traced value."""
    inputs, state, reset = made(case, "float32")

    def total(inputs):
        leaves = jax.tree.leaves(case.run(inputs, state, reset)[0])
        return sum(jnp.sum(jnp.real(leaf)) for leaf in leaves)

    with checking_leaks():
        jax.jit(jax.grad(total)).trace(inputs)


@pytest.mark.quick("linear_attention-scalar")
@EACH
def test_no_traced_value_is_left_in_a_primitive(case, strict, compiled_quickly):
    inputs, state, reset = made(case, "float32")

    def total(inputs, scale):
        return jnp.sum(case.run(inputs, state, reset, scale=scale)[0])

    with checking_leaks():
        # Traced only: under this check nothing is cached, and compiling would trace many times.
        jax.jit(jax.grad(total, argnums=(0, 1))).trace(inputs, 0.3)
        case.run(inputs, state, reset, scale=0.3)
        case.run(inputs, state, reset)


@EACH
def test_a_new_scale_does_not_compile(case):
    inputs, state, reset = made(case, "float32")
    compilations = []

    def listen(event, *args, **keywords):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    case.run(inputs, state, reset, scale=0.3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        case.run(inputs, state, reset, scale=0.7)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations


@pytest.mark.quick("linear_attention-scalar-xla")
@pytest.mark.parametrize(
    ("case", "keywords"),
    [pytest.param(case, {}, id=f"{case}-xla") for case in CASES]
    + [
        pytest.param(case, KERNEL, id=f"{case}-pallas", marks=pytest.mark.slow)
        for case in CASES
        if "pallas" in case.algorithms
    ],
)
def test_scale_multiplies_the_outputs(case, keywords, x64, strict, compiled_quickly):
    """Compare values and gradients, also of the scale, with those of the default scale."""
    inputs, state, reset = made(case, "float64")
    run = functools.partial(case.run, state=state, reset=reset, **keywords)

    def by_scale(inputs, scale):
        return jnp.sum(jnp.sin(run(inputs, scale=scale)[0]))

    def by_factor(inputs, scale):
        default = inputs["q"].shape[-1] ** -0.5
        return jnp.sum(jnp.sin(run(inputs)[0] * (scale / default)))

    scale = jnp.float64(0.3)
    both = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(inputs, scale) for f in (by_scale, by_factor)
    ]
    assert_close(*both, 1e-11)


@pytest.mark.parametrize("scale", [1j, np.ones(3), True, "large"], ids=repr)
def test_bad_scales(scale):
    one = jnp.ones((1, 3, 1, 2))
    with pytest.raises(ValueError, match=r"^linear_attention: `scale` must be a real number"):
        seqjax.linear_attention(one, one, one, scale=scale)
