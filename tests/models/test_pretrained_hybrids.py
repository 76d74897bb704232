"""Jamba, Zamba, MiniMax-01 and Kimi Linear: shards, time over a mesh, config fields."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax import pretrained, sharding
from tests.models.test_pretrained import FOLDER, TOLERANCE, edited, load

pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", ["jamba", "zamba", "zamba2"])
def test_a_mesh_holds_the_shards(name):
    _, expected, tokens, logits = load(name)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    model, params, *_ = load(name, mesh=mesh)
    where = sharding.shard(model, mesh).params
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == place
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_time_over_a_mesh(name):
    model, params, tokens, logits = load(name)
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda params, tokens: model.apply(params, tokens, sequence_axis="time")[0],
        mesh=mesh,
        in_specs=(P(), P(None, "time")),
        out_specs=P(None, "time"),
    )
    got = jax.jit(split)(params, tokens[:, :36])
    np.testing.assert_allclose(got, logits[:, :36], **TOLERANCE)


ATTENTION = {"layers_block_type": ["attention"] * 4}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("jamba", {"mamba_inner_layernorms": False}, "`mamba_inner_layernorms` must be True"),
        ("jamba", {"attn_layer_offset": 2}, "`attn_layer_offset` must be from 0 to .* = 1, got 2"),
        ("jamba", {"mamba_dt_rank": 4}, r"x_proj.weight` must have shape \[14, 48\]"),
        ("zamba", {"hidden_mamba_act": "gelu"}, "`hidden_mamba_act` must be 'silu', got 'gelu'"),
        ("zamba", {"attention_hidden_size": 48}, "`attention_hidden_size` must be 32, got 48"),
        ("zamba", {"hidden_act": "tanh"}, "`hidden_act` must be 'gelu' or .*, got 'tanh'"),
        ("zamba", {"n_mamba_heads": 2}, r"x_proj_weight` must have shape \[2, 10, 16\]"),
        ("zamba", ATTENTION, "`layers_block_type` must have entries of 'mamba' and 'hybrid'"),
        ("zamba2", {"use_long_context": True}, "`use_long_context` must be False, got True"),
        ("zamba2", {"num_key_value_heads": 2}, "`num_key_value_heads` must be 4, got 2"),
        ("zamba2", {"n_mamba_heads": 3}, "`n_mamba_heads` must divide .* = 32, got 3"),
        ("zamba2", {"num_mem_blocks": 1}, r"layers\.0\..*q_adapter_list\.1\.0\.weight`, got none"),
        ("zamba2", {"tie_word_embeddings": False}, "`tie_word_embeddings` must be True, got False"),
        ("zamba2", {"adapter_rank": 2}, r"adapter_list.0.0.weight` must have shape \[2, 16\]"),
    ],
)
def test_errors_name_the_field_or_the_tensor(name, config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(edited(tmp_path, name, config))
    assert "\n" not in str(caught.value)


def test_shared_blocks_are_stored_once(tmp_path):
    """Check that each shared block is one set of parameters, used by several layers."""
    model, params, *_ = load("zamba2")
    assert sorted(params["backbone"]["shared"]) == ["0", "1"]
    uses = [block.injection and block.injection.name for block in model.backbone.stack]
    assert uses == ["0", None, "1", "0"]
    config = json.loads((FOLDER / "zamba2" / "config.json").read_text())
    assert config["layers_block_type"].count("hybrid") == 3
