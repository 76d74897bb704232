"""Jamba, Zamba, MiniMax-01 and Kimi Linear: shards, time over a mesh, config fields."""

import json

import jax
import numpy as np
import pytest

from seqjax import pretrained
from tests.models.test_pretrained import CAPACITY, FOLDER, edited, load

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


NUMBERS = {
    "layer_types": None,
    "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2]},
}
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
        ("zamba2", {"num_mem_blocks": 1}, r"layers\.0\..*adapter_list\.1\.0\.weight`, got none"),
        ("zamba2", {"tie_word_embeddings": False}, "`tie_word_embeddings` must be True, got False"),
        ("minimax", {"rotary_dim": 3}, "`rotary_dim` must be even, got 3"),
        ("minimax", {"rotary_dim": 8}, "at most the features of a head = 6, got 8"),
        ("minimax", {"num_experts_per_tok": 5}, "at most num_local_experts = 4, got 5"),
        ("minimax", {"num_local_experts": 5}, r"layers.0.*experts.4.w1.weight`, got none"),
        ("kimi_linear", {"mla_use_nope": False}, "`mla_use_nope` must be True, got False"),
        ("kimi_linear", {"num_key_value_heads": 1}, "`num_key_value_heads` must be 2, got 1"),
        ("kimi_linear", {"tie_word_embeddings": True}, "`tie_word_embeddings` must be False"),
        ("kimi_linear", {"topk_group": 3}, "`topk_group` must be at most num_expert_group = 2"),
        ("kimi_linear", {"num_expert_group": 3}, "`num_expert_group` must divide num_experts into"),
        ("kimi_linear", {"mlp_layer_types": ["dense"]}, "`mlp_layer_types` must have 3 entries"),
        ("kimi_linear", NUMBERS, "`linear_attn_config` must have each layer from 1 to .* = 3"),
        ("kimi_linear", {"kv_lora_rank": 5}, r"kv_a_proj_with_mqa.weight` must have shape \[7, 16"),
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


def test_layers_of_kimi_may_be_numbered_from_one(tmp_path):
    model, expected, *_ = load("kimi_linear")
    numbered = NUMBERS["linear_attn_config"] | {
        "full_attn_layers": [2],
        "kda_layers": [1, 3],
        "num_heads": 2,
        "head_dim": 4,
        "short_conv_kernel_size": 4,
    }
    fields = {"layer_types": None, "linear_attn_config": numbered, "mlp_layer_types": None}
    again, params = pretrained.load(
        edited(tmp_path, "kimi_linear", fields | {"first_k_dense_replace": 1}), capacity=CAPACITY
    )
    assert again.backbone == model.backbone
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_decays_of_kimi_may_have_one_axis(tmp_path):
    _, expected, *_ = load("kimi_linear")
    stored = safetensors.load_file(FOLDER / "kimi_linear" / "model.safetensors")
    flat = {key: value.reshape(-1) for key, value in stored.items() if key.endswith("A_log")}
    _, params = pretrained.load(edited(tmp_path, "kimi_linear", **flat))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", ["jamba_experts", "minimax", "kimi_linear"])
def test_experts_in_one_tensor_are_read_and_written_back(name, tmp_path):
    _, expected, *_ = load(name)
    stored = safetensors.load_file(FOLDER / name / "model.safetensors")
    old = sorted(key for key in stored if ".experts." in key)
    fused = {}
    for prefix in {key.split(".experts.")[0] + ".experts." for key in old}:
        names = ("w1", "w3", "w2") if f"{prefix}0.w1.weight" in stored else ("gate_proj", "up_proj")
        names = names if len(names) == 3 else (*names, "down_proj")
        count = sum(key.startswith(prefix) for key in old) // 3
        gate, up, down = (
            np.stack([stored[f"{prefix}{i}.{kind}.weight"] for i in range(count)]) for kind in names
        )
        fused[prefix + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[prefix + "down_proj"] = down
    folder = edited(tmp_path, name, drop=old, **fused)
    model, params = pretrained.load(folder, capacity=CAPACITY)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    pretrained.save(model, params, tmp_path / "copy")
    written = safetensors.load_file(tmp_path / "copy" / "model.safetensors")
    assert written.keys() == (stored.keys() - set(old)) | fused.keys()
    for key, value in fused.items():
        np.testing.assert_array_equal(written[key], value)
