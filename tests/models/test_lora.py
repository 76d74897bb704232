"""Low-rank adapters, and models of checkpoints without their weights."""

import json
import pathlib

import jax
import numpy as np
import pytest

from seqjax import layers, models, pretrained, sharding

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("quick_compilation")
FOLDER = pathlib.Path(__file__).parent / "checkpoints"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


@pytest.mark.quick("False-mamba2", "True-qwen3_5_text", "False-kimi_linear", "True-zamba2")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scan", [False, True])
def test_models_and_adapters_have_the_shapes_of_the_weights(name, scan):
    model, params = pretrained.load(FOLDER / name, dtype="bfloat16", capacity=8, scan=scan)
    bare = pretrained.read_model(FOLDER / name, "bfloat16", capacity=8, scan=scan)
    assert bare == model
    shapes = pretrained.abstract_params(bare)
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or 1 / 0, shapes, params)
    config = json.loads((FOLDER / name / "config.json").read_text())
    if not model.source.sizes:  # sizes that a config omits come from the tensors
        # The dtype of attention caches follows that of the model.
        alone = pretrained.read_model(config, "bfloat16", capacity=8, scan=scan)
        assert alone.backbone == bare.backbone

    lora = pretrained.LoRA(model, rank=2)
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, adapters) == lora.param_shapes()
    merged = jax.eval_shape(lora.merge, shapes, adapters)
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or 1 / 0, merged, shapes)
    mesh = sharding.make_mesh("fsdp=4,tensor=1,data=2")
    where = sharding.shard(lora, mesh).params
    assert jax.tree.structure(where) == jax.tree.structure(adapters)


def test_merged_weights_are_the_sum():
    block = models.Block(layers.DeltaNet(8, heads=2), layers.GatedMLP(8, 16))
    model = models.Backbone([block], depth=3, scan=True)
    params = model.init(jax.random.key(0))
    lora = pretrained.LoRA(model, rank=2, alpha=6.0)
    adapters = lora.init(jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    merged = lora.merge(params, adapters)
    pair = adapters["group_0"]["mlp"]["up_proj"]
    assert pair["A"].shape == (3, 8, 2)
    assert pair["B"].shape == (3, 2, 16)
    weight = np.asarray(params["group_0"]["mlp"]["up_proj"], np.float64)
    expected = weight + 3.0 * np.einsum("lir,lro->lio", *(np.float64(pair[n]) for n in "AB"))
    np.testing.assert_allclose(merged["group_0"]["mlp"]["up_proj"], expected, rtol=1e-5, atol=1e-6)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, merged)
    assert same["group_0"]["mixer_norm"]["scale"]
    assert not same["group_0"]["mixer"]["q_proj"]


def test_errors_of_adapters():
    with pytest.raises(ValueError, match="`rank` must be an integer >= 1, got 0"):
        pretrained.LoRA(layers.DeltaNet(8, heads=2), rank=0)
    with pytest.raises(ValueError, match=r"weights named \*_proj, got RMSNorm"):
        pretrained.LoRA(layers.RMSNorm(8), rank=1)
    with pytest.raises(ValueError, match="`alpha` must be > 0"):
        pretrained.LoRA(layers.DeltaNet(8, heads=2), rank=1, alpha=0.0)
