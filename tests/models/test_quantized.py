"""Projections in int8 with qwix; skipped without qwix."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.int8 import dequantize, quantize
from seqjax import pretrained

pytest.importorskip("qwix")
pytest.importorskip("safetensors")
FOLDER = pathlib.Path(__file__).parent / "checkpoints"


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["mamba", "qwen3_5_text", "falcon_h1"])
def test_int8_projections_are_rounded_weights(name, scan):
    model, params = pretrained.load(FOLDER / name, capacity=64, scan=scan)
    tokens = jnp.asarray(np.load(FOLDER / name / "logits.npz")["tokens"], jnp.int32)
    small = quantize(params)
    assert jnp.int8 in [leaf.dtype for leaf in jax.tree.leaves(small)]
    rounded = dequantize(small)

    def check(path, leaf, value):
        if not path[-1].key.endswith("_proj"):
            np.testing.assert_array_equal(leaf, value)
            return
        # A scale of 1/127 of the largest weight of a column moves a weight by at most half of it.
        largest = np.abs(value).max(axis=-2, keepdims=True)
        assert (np.abs(leaf - value) <= largest / 254 * 1.01).all()

    jax.tree_util.tree_map_with_path(check, rounded, params)
    apply = jax.jit(lambda small, tokens: model.apply(dequantize(small), tokens)[0])
    expected, _ = jax.jit(model.apply)(rounded, tokens)
    np.testing.assert_allclose(apply(small, tokens), expected, atol=1e-4)


def test_int8_projections_give_nearly_the_logits():
    """Check a model without gates that amplify the rounding of random weights."""
    model, params = pretrained.load(FOLDER / "mamba")
    stored = np.load(FOLDER / "mamba" / "logits.npz")
    tokens = jnp.asarray(stored["tokens"], jnp.int32)
    got, _ = jax.jit(model.apply)(dequantize(quantize(params)), tokens)
    error = np.abs(got - stored["logits"]).mean()
    assert 0 < error < 0.03 * np.abs(stored["logits"]).mean()
