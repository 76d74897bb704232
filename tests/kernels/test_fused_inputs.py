"""Interpreted kernels of the delta rule that normalize q and k and apply the gate of the decays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.contract.harness import assert_close
from tests.kernels.test_matrix_kernels import arrays


def fused(implementation, decay, chunk_size, given, reset, scale=None):
    """Return the outputs, the final state and the gradients of all arrays."""
    options = {"implementation": "xla"}
    if implementation == "pallas":
        options = {"interpret": True, "chunk_size": chunk_size}

    @jax.jit
    def run(given):
        def op(given):
            others = {name: x for name, x in given.items() if name not in ("A_log", "dt_bias")}
            gate = seqjax.ops.SoftplusGate(given["A_log"], given["dt_bias"]) if decay else None
            return seqjax.delta_rule(
                **others, scale=scale, normalize=True, gate=gate, reset=reset, **options
            )

        out, pull = jax.vjp(op, given)
        cosines = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), out)
        return out, pull(jax.tree.map(lambda c, x: c.astype(x.dtype), cosines, out))

    return run(given)


def inputs(decay, batch, length, heads, keys, values, dtype="float64"):
    """Return unnormalized vectors, and the inputs of a gate if there are decays."""
    given = arrays("delta_rule", decay, batch, length, heads, keys, values, dtype)
    given["beta"] = jnp.full_like(given["beta"], 0.7)
    given["initial_state"] = jnp.ones((batch, heads, keys, values), dtype)
    if decay is not None:
        rng = np.random.default_rng(1)
        given["log_decay"] = jnp.asarray(rng.standard_normal(given["log_decay"].shape), dtype)
        given["A_log"] = jnp.asarray(rng.uniform(-1, 1, heads), dtype)
        bias = (heads,) if decay == "scalar" else (heads, keys)
        given["dt_bias"] = jnp.asarray(rng.standard_normal(bias), dtype)
    return given


def compare(decay, given, reset=None, chunk_size=8, scale=None):
    run = functools.partial(
        fused, decay=decay, chunk_size=chunk_size, given=given, reset=reset, scale=scale
    )
    assert_close(run("pallas"), run("xla"), 1e-11)


@pytest.mark.parametrize(("decay", "scale"), [("channel", None), ("scalar", 0.3)])
def test_values_and_gradients(decay, scale, x64, strict, compiled_quickly):
    """Check a ragged last chunk, a reset, and gradients of A_log and dt_bias.

    A scale multiplies the normalized queries.
    """
    reset = np.arange(22).reshape(2, 11) % 11 == 5
    compare(decay, inputs(decay, 2, 11, 2, 3, 2), reset, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["channel", "scalar", None])
def test_more_heads_than_a_block_in_chunks_with_levels(decay, x64, strict, compiled_quickly):
    compare(decay, inputs(decay, 1, 39, 10, 3, 2), chunk_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["channel", "scalar"])
def test_inputs_that_are_not_finite(decay, x64, compiled_quickly):
    """Check that NaN and infinity reach the same outputs, up to the next reset."""
    given = inputs(decay, 1, 13, 2, 3, 2)
    given["log_decay"] = given["log_decay"].at[0, 3, 0].set(jnp.nan).at[0, 9].set(-jnp.inf)
    given["q"] = given["q"].at[0, 4, 1, 0].set(jnp.inf)
    given["k"] = given["k"].at[0, 10, 1].set(0)
    reset = np.arange(13)[None] == 7
    run = functools.partial(fused, decay=decay, chunk_size=8, given=given, reset=reset)
    (found, state), _ = run("pallas")
    (expected, expected_state), _ = run("xla")
    # A chunk of the XLA form may spread a number that is not finite to earlier steps.
    assert np.all(np.isnan(found[0, 3:7, 0]))
    assert np.all(np.isnan(found[0, 4, 1]))
    assert_close((found[:, 7:], state), (expected[:, 7:], expected_state), 1e-11)
    assert np.all(np.isfinite(found[0, :3]))
    assert np.all(np.isfinite(found[0, 5:, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["channel", "scalar"])
def test_whole_tiles_in_bfloat16(decay, compiled_quickly):
    """Check 8 heads of 128 keys in bfloat16, two in a word, against the XLA form in float32."""
    given = inputs(decay, 1, 24, 8, 128, 128, "float32")
    narrow = {name: x.astype("bfloat16") for name, x in given.items() if name in "qkv"}
    narrow["log_decay"] = given["log_decay"].astype("bfloat16")
    narrow = given | narrow
    found = fused("pallas", decay, 16, narrow, None)
    wide = {name: x.astype("float32") for name, x in narrow.items()}
    assert_close(found, fused("xla", decay, 16, wide, None), 2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": (1.0, 2.0)}, "`gate` must be a SoftplusGate, got tuple"),
        ({"log_decay": None}, "`log_decay` must be the input of the gate, got None"),
        ({"log_decay": "heads"}, r"`dt_bias` must have shape \[H=2\], got \[2, 3\]"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    given = inputs("channel", 1, 4, 2, 3, 2, "float32")
    gate = seqjax.ops.SoftplusGate(given.pop("A_log"), given.pop("dt_bias"))
    if change.get("log_decay") == "heads":
        change = {"log_decay": given["log_decay"][..., 0]}
    with pytest.raises(ValueError, match=message):
        seqjax.delta_rule(**given | {"gate": gate} | change)
