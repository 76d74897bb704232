"""Numerics of the matrix-state ops that errors relative to the largest result do not show.

Errors of gradients of strong decays are relative to the scale of their channel. Errors of the
bfloat16 kernel are relative to the error of rounding the exact result to bfloat16.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.contract.case import unit
from tests.contract.harness import unoptimized

STRONG = [-6.0, -9.0, -12.0, -16.0, -20.0, -50.0, -np.inf]


def strong_decays(op, decay, rng, batch=2, length=37):
    """Draw inputs in which half of the channels, heads or steps have strong decays."""
    heads, keys, values = (8, 2, 3) if decay == "head" else (1, 14, 3)

    def normal(*shape):
        return rng.standard_normal((batch, length, heads, *shape))

    made = {"q": normal(keys), "k": unit(normal(keys)), "v": normal(values)}
    if op == "delta_rule":
        made["beta"] = rng.uniform(0, 2, (batch, length, heads))
    if op == "generalized_delta_rule":
        made["a"] = unit(normal(keys))
        made["b"] = -made["a"] * rng.uniform(0, 1, (batch, length, heads, keys))
    g = -rng.uniform(0, 1, (batch, length, heads) if decay == "head" else made["k"].shape)
    if decay == "steps":
        g[:, ::2] = -20.0
    elif decay == "head":
        g[..., : len(STRONG)] = STRONG
    else:
        g[..., ::2] = STRONG
    if decay == "complex":
        g = g + 1j * rng.uniform(-3, 3, g.shape)
    return made | {"log_decay": g}


def decay_gradients(op, inputs, dtype, **keywords):
    def loss(log_decay, rest):
        out, final = getattr(seqjax, op)(**rest, log_decay=log_decay, **keywords)
        w = jnp.cos(jnp.arange(out.size, dtype=dtype)).reshape(out.shape)
        return jnp.sum(jnp.real(out) * w) + jnp.sum(jnp.real(final))

    rest = {
        name: jnp.asarray(x, np.result_type(dtype, np.complex64) if np.iscomplexobj(x) else dtype)
        for name, x in inputs.items()
    }
    log_decay = rest.pop("log_decay")
    return np.asarray(jax.jit(jax.grad(loss))(log_decay, rest))


def in_float32(x):
    return x.astype(np.complex64 if np.iscomplexobj(x) else np.float32)


FORMS = [
    *(("linear_attention", decay) for decay in ("channel", "head", "steps", "complex")),
    *(("delta_rule", decay) for decay in ("channel", "head", "steps")),
    *(("generalized_delta_rule", decay) for decay in ("channel", "head")),
]
SLOW = pytest.mark.slow


def strong_forms():
    """Yield every form; one of each op is quick."""
    for op, decay in FORMS:
        for algorithm in ("chunked", "associative", "sequential", "pallas"):
            if algorithm == "pallas" and (op == "generalized_delta_rule" or decay == "complex"):
                continue
            quick = algorithm == "chunked" and decay == "channel"
            marks = () if quick else (SLOW,)
            yield pytest.param(op, decay, algorithm, marks=marks, id=f"{op}-{decay}-{algorithm}")


@pytest.mark.quick("delta_rule-channel-chunked")
@pytest.mark.parametrize(("op", "decay", "algorithm"), [*strong_forms()])
def test_gradients_of_strong_decays(op, decay, algorithm, compiled_quickly):
    """Check errors relative to the channel's largest gradient, elementwise and summed over B, T."""
    inputs = jax.tree.map(in_float32, strong_decays(op, decay, np.random.default_rng(0)))
    with jax.enable_x64(True):
        expected = decay_gradients(op, inputs, "float64", algorithm="sequential")
    keywords = (
        {"algorithm": algorithm}
        if algorithm != "pallas"
        else {
            "implementation": "pallas",
            "interpret": True,
        }
    )
    chunk = {} if algorithm == "sequential" else {"chunk_size": 32}
    found = decay_gradients(op, inputs, "float32", **keywords, **chunk)
    scale = np.abs(expected).max(axis=(0, 1))
    assert (found[:, :, scale == 0] == 0).all()  # a decay of -inf
    assert (scale > 0).any()
    seen = scale > 0
    errors = np.abs(found - expected).max(axis=(0, 1))[seen] / scale[seen]
    assert errors.max() <= 4e-6
    sums = np.abs(found.sum(axis=(0, 1)) - expected.sum(axis=(0, 1)))[seen] / scale[seen]
    assert sums.max() <= 4e-5  # of 74 elements


@pytest.mark.quick("chunked")
@pytest.mark.parametrize("algorithm", ["sequential", "chunked", "associative"])
def test_a_gradient_that_is_smaller_than_rounding(algorithm):
    """Check d log_decay of a single channel: 0 at the first step, q k v exp(g) at the second."""
    q, k, v = (jnp.full((1, 2, 1, 1), value) for value in (0.3, 0.7, 1.1))

    def loss(g):
        out, _ = seqjax.linear_attention(q, k, v, g, algorithm=algorithm)
        return out[0, 1].sum()

    found = jax.grad(loss)(jnp.full((1, 2, 1, 1), -20.0))
    np.testing.assert_allclose(found.ravel(), [0, 0.231 * np.exp(-20.0)], rtol=1e-5)


def rounded(x):
    """Return x rounded to bfloat16, in float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)


def correlated(correlation, beta, gates, decay="head", length=96, keys=32, values=8):
    """Draw delta rule inputs whose keys have a correlation, with gates from `gates`."""
    rng = np.random.default_rng(0)

    def normal(size, steps=length):
        return rng.standard_normal((1, steps, 1, size))

    own, common = unit(normal(keys)), unit(normal(keys, 1))
    k = unit(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)
    return {
        "q": rounded(normal(keys)),
        "k": rounded(k),
        "v": rounded(normal(values)),
        "beta": np.full((1, length, 1), beta),
        "log_decay": rng.choice(gates, (1, length, 1, keys)[: 3 if decay == "head" else 4]) * 1.0,
        "initial_state": np.zeros((1, 1, keys, values)),
    }


@functools.cache
def delta_rule_and_gradients(form):
    keywords = {
        "exact": {"algorithm": "sequential"},
        "chunked": {"algorithm": "chunked", "chunk_size": 64},
        "pallas": {"implementation": "pallas", "interpret": True, "chunk_size": 64},
    }[form]

    @jax.jit
    def run(inputs):
        (out, final), pull = jax.vjp(lambda x: seqjax.delta_rule(**x, **keywords), inputs)
        w = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(jnp.bfloat16)
        gradients = pull((w.astype(out.dtype), jnp.zeros_like(final)))[0]
        return {"out": out, "final": final} | gradients

    return run


def times_the_floor(inputs, form):
    """Return by result the error as a multiple of the rounding error of the exact result."""
    with jax.enable_x64(True), unoptimized():
        exact = delta_rule_and_gradients("exact")(jax.tree.map(jnp.asarray, inputs))
        exact = jax.tree.map(np.asarray, exact)
    given = {
        name: jnp.asarray(x, jnp.bfloat16 if name in ("q", "k", "v") else jnp.float32)
        for name, x in inputs.items()
    }
    with unoptimized():
        found = delta_rule_and_gradients(form)(given)
    times = {}
    for name, expected in exact.items():
        error = np.abs(np.asarray(found[name]).astype(np.float64) - expected).max()
        # A result may be exact in bfloat16 by chance: at least a quarter of its largest rounding.
        floor = max(np.abs(rounded(expected) - expected).max(), np.abs(expected).max() * 2**-11)
        times[name] = error / floor if floor else float(error > 0)
    return times


CORRELATED = {
    "identical": (1.0, 1.0, [0]),
    "identical, beta 2": (1.0, 2.0, [0]),
    "correlation 0.99": (0.99, 1.0, [0]),
    "gates -5": (1.0, 1.0, [-5]),
    "gates -25": (1.0, 1.0, [-25]),
    "gates -150": (1.0, 1.0, [-150]),
    "mixed gates": (1.0, 1.0, [0, -5, -25, -150]),
    "correlation 0.99, mixed gates": (0.99, 1.0, [0, -5, -25, -150]),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chunked", "pallas"])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("name", CORRELATED)
def test_correlated_keys_in_bfloat16(name, decay, form):
    """Allow four times the rounding floor, for outputs, final state and gradients.

    With identical keys and beta 1, a step clears all that the state holds. The gradient of a decay
    per head is then a sum over channels that cancels, and its scale is the scale of the channels.
    """
    correlation, beta, _ = CORRELATED[name]
    inputs = correlated(*CORRELATED[name], decay)
    times = times_the_floor(inputs, form)
    if (correlation, beta, decay) == (1, 1, "head"):
        g = inputs["log_decay"]
        inputs["log_decay"] = np.broadcast_to(g[..., None], inputs["k"].shape)
        with jax.enable_x64(True), unoptimized():
            exact = delta_rule_and_gradients("exact")
            by_head = exact(inputs | {"log_decay": g})["log_decay"]
            by_channel = exact(inputs)["log_decay"]
        times["log_decay"] *= np.abs(by_head).max() / np.abs(by_channel).max()
    assert max(times.values()) <= 4, times


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chunked", "pallas"])
def test_a_residual_of_2_in_4096(form):
    """Resolve a state that differs from the values by 2, in a state of more bits than bfloat16.

    Columns do not mix, so one of 2 beside one of 4096 is judged by itself.
    """
    inputs = correlated(1.0, 1.0, [0])
    key = inputs["k"][0, 0, 0]
    inputs["v"][...] = 4096.0
    inputs["v"][..., 1] = 2.0
    held = inputs["v"][0, 0, 0] + 2.0
    inputs["initial_state"][...] = np.outer(key / (key @ key), held).astype(np.float32)
    inputs["beta"][:, :] = 0.25
    times = times_the_floor(inputs, form)
    for name in ("out", "final", "beta"):
        assert times[name] <= 4, times
    narrow = {
        name: x[..., 1:2] if name in ("v", "initial_state") else x for name, x in inputs.items()
    }
    assert times_the_floor(narrow, form)["out"] <= 4


AVX512 = """
import jax, seqjax
from jax import numpy as jnp

jax.config.update("jax_enable_x64", True)
array = jax.ShapeDtypeStruct((1, 8, 2, 3), jnp.float64)
gate = array.update(shape=array.shape[:-1])
for op, names in (("linear_attention", "qkv"), ("generalized_delta_rule", "qkvab")):
    run = getattr(seqjax, op)
    given = {name: array for name in names} | {"log_decay": gate}
    loss = lambda given: run(**given, algorithm="chunked", chunk_size=8)[0].sum()
    print(op, jax.jit(jax.grad(loss)).lower(given).compile().as_text()[:9])
"""


@pytest.mark.slow
def test_float64_gradients_in_chunks_of_8_compile():
    """Compile in another process: on CPUs with AVX-512 the compiler of jaxlib 0.10.2 aborted.

    The process has the compiler flags of a user, not those of the tests. CPUs without AVX-512
    get other instructions, so the test always passes there.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", AVX512], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        "linear_attention",
        "HloModule",
        "generalized_delta_rule",
        "HloModule",
    ]
