"""Errors of the accelerators' form of the chunked ops on bfloat16 inputs, computed on CPU.

Products of two bfloat16 factors are exact and added in float32, as on the matrix units of GPUs and
TPUs. The tests round the float32 factors of other products to 10 bits, as GPUs do (TF32).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import seqjax
from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import chunk_sizes
from tests.contract.case import unit

SHAPE = (1, 192, 2, 64)  # three chunks of 64 steps
SLOW = pytest.mark.slow


def in_tf32(einsum):
    """Return `einsum` with float32 factors rounded to TF32, unless both factors are bfloat16."""

    def run(x, y, *axes, **keywords):
        if x.dtype != y.dtype or x.dtype == jnp.float32:
            x, y = (lax.reduce_precision(z.astype(jnp.float32), 8, 10) for z in (x, y))
        return einsum(x, y, *axes, **keywords)

    return run


@pytest.fixture(autouse=True, scope="module")
def accelerators_form():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_sizes, "CPU", chunk_sizes.ACCELERATOR)
        patch.setattr(linalg, "_einsum", in_tf32(linalg._einsum))
        jax.clear_caches()
        yield
    jax.clear_caches()


def rounded(x):
    """Return x rounded to bfloat16, in float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)


def draw(op, decay, identical, seed=0):
    """Draw random inputs; identical keys are written with strength one."""
    rng = np.random.default_rng(seed)
    k = unit(rng.standard_normal(SHAPE))
    k = np.broadcast_to(k[:, :1], SHAPE) if identical else k
    made = {"q": rng.standard_normal(SHAPE), "k": k, "v": rng.standard_normal(SHAPE)}
    strength = np.ones(SHAPE[:3]) if identical else rng.uniform(0, 1, SHAPE[:3])
    if op == "generalized_delta_rule":
        made |= {"a": k, "b": -k * strength[..., None]}
    made = {name: rounded(x) for name, x in made.items()}
    if op == "delta_rule":
        made["beta"] = strength.astype(np.float32).astype(np.float64)
    if decay is not None:
        shape = SHAPE[:3] if decay == "head" else SHAPE
        made["log_decay"] = -rng.uniform(0, 0.1, shape).astype(np.float32).astype(np.float64)
    return made


def values_and_gradients(op, inputs, algorithm):
    """Return the outputs, the final state, and the gradients of all inputs."""

    @jax.jit
    def run(inputs):
        def call(x):
            return getattr(seqjax, op)(**x, algorithm=algorithm)

        (out, final), pull = jax.vjp(call, inputs)
        w = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(jnp.bfloat16)
        gradients = pull((w.astype(out.dtype), jnp.zeros_like(final)))[0]
        return {"out": out, "final": final}, gradients

    return jax.tree.map(np.asarray, run(inputs))


def times_the_floor(op, decay, identical, seed=0):
    """Return errors of values and gradients relative to that of rounding the exact numbers."""
    inputs = draw(op, decay, identical, seed)
    with jax.enable_x64(True):
        exact = values_and_gradients(op, jax.tree.map(jnp.asarray, inputs), "sequential")
    narrow = {
        name: jnp.asarray(x, jnp.float32 if name in ("beta", "log_decay") else jnp.bfloat16)
        for name, x in inputs.items()
    }
    found = values_and_gradients(op, narrow, "chunked")

    def ratio(found, exact):
        error = np.abs(found.astype(np.float64) - exact).max()
        # A result may be exact in bfloat16 by chance: at least a quarter of its largest rounding.
        return error / max(np.abs(rounded(exact) - exact).max(), np.abs(exact).max() * 2**-11)

    return tuple(
        {name: float(ratio(found[i][name], exact[i][name])) for name in exact[i]} for i in (0, 1)
    )


CASES = [
    pytest.param(
        op,
        decay,
        identical,
        marks=() if (op, decay, identical) == ("delta_rule", "head", True) else SLOW,
    )
    for op in ("linear_attention", "delta_rule", "generalized_delta_rule")
    for decay in (None, "head", "channel")
    for identical in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "decay", "identical"), CASES)
def test_errors_on_bfloat16_inputs(op, decay, identical):
    """Allow twice the error of rounding the result, and four times for identical keys.

    The gradients of keys and values add up to six results that were rounded to bfloat16, and cancel
    if keys repeat.
    """
    values, gradients = times_the_floor(op, decay, identical)
    assert max(values.values()) <= (4 if identical else 2), values
    if identical:
        gradients.pop("log_decay", None)  # a sum over channels that cancels
    assert max(gradients.values()) <= (16 if identical else 6), gradients
