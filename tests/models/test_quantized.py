"""Projections in int8 with qwix, as in docs/guides/pretrained.md; skipped without qwix."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import pretrained

qwix = pytest.importorskip("qwix")
pytest.importorskip("safetensors")
FOLDER = pathlib.Path(__file__).parent / "checkpoints"


def quantize(params):
    """Return the parameters with projections in int8 and a scale for each output feature."""

    def leaf(path, value):
        if not path[-1].key.endswith("_proj"):
            return value
        kept = [axis for axis in range(value.ndim) if axis != value.ndim - 2]
        return qwix.quantize(value, jnp.int8, channelwise_axes=kept)

    return jax.tree_util.tree_map_with_path(leaf, params)


def dequantize(params):
    """Return arrays; call it inside `jax.jit`."""

    def is_quantized(leaf):
        return isinstance(leaf, qwix.QArray)

    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


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
