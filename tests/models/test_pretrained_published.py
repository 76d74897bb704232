"""Fields and tensors of published checkpoints that files of transformers do not have."""

import json

import jax
import numpy as np
import pytest

from seqjax import pretrained
from tests.models.test_pretrained import FOLDER, edited, load

safetensors = pytest.importorskip("safetensors.numpy")


def fields(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def mixers(model):
    return [block.mixer for block in model.backbone.stack]


def test_the_rotated_features_of_minimax():
    """Check `rotary_dim` of MiniMax-Text-01, 64 of 128 features."""
    model = pretrained.read_model(fields("minimax") | {"rotary_dim": 4})
    assert [getattr(mixer.layer, "rotary_dim", None) for mixer in mixers(model)] == [None, 4, None]


def test_the_features_of_a_head_of_nemotron():
    """Check `attention_head_dim` of Nemotron-H-8B."""
    config = fields("nemotron_h")
    old = {k: v for k, v in config.items() if k != "head_dim"}
    model = pretrained.read_model(old | {"attention_head_dim": config["head_dim"]})
    assert model.backbone == pretrained.read_model(config).backbone


@pytest.mark.parametrize(
    ("rope", "rotated"),
    [
        ({}, 6),
        ({"rope_parameters": None}, 6),
        ({"rope_theta": None}, 0),
        ({"rope_parameters": None, "rope_theta": None}, 0),
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, 0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, 0),
        ({"rope_theta": 1e6}, 6),
    ],
)
def test_positions_of_olmo_hybrid(rope, rotated):
    """Check that a base of null turns positions off, and a missing one is the default."""
    config = {k: v for k, v in fields("olmo_hybrid").items() if not k.startswith("rope_")}
    model = pretrained.read_model(config | rope)
    assert mixers(model)[1].rotary_dim == rotated


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "nemotron_h", "olmo_hybrid"])
def test_heads_for_further_tokens_are_not_read(name, tmp_path):
    _, expected, *_ = load(name)
    folder = edited(tmp_path, name, **{"mtp.layers.0.norm.weight": np.ones(3, "f4")})
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], expected)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_ends_with_one_line(content, tmp_path):
    folder = edited(tmp_path, "mamba")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"^load: .*`weight_map`"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("bamba", {"hidden_size": 7}, "load: config.json must describe a valid model; .*dim=7"),
        ("recurrent_gemma", {"logits_soft_cap": -1}, "load: .*`logits_soft_cap` must be > 0"),
        ("nemotron_h", {"n_groups": 3}, "load: config.json must describe a valid model; .*groups"),
    ],
)
def test_values_that_no_model_has_end_with_one_line(name, config, message):
    with pytest.raises(ValueError, match=message):
        pretrained.read_model(fields(name) | config)
