"""Values of config fields that must end with one line, and downloads from the hub."""

import json
import math
import pathlib
import sys
import types

import pytest

from seqjax import layers, models, pretrained
from seqjax.pretrained import hub
from seqjax.pretrained.config import Config
from tests.models.test_pretrained import FOLDER

YARN = {"rope_type": "yarn", "factor": 4.0}


def fields(name):
    return json.loads((FOLDER / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rwkv7", {"hidden_size": 32, "head_dim": 64, "num_heads": None}, "= 32, and"),
        ("rwkv7", {"num_heads": "1"}, "`num_heads` must be a positive integer, got '1'"),
        ("mamba2", {"time_step_limit": [0.0]}, "`time_step_limit` must be a list of 2 elements"),
        ("mamba2", {"time_step_limit": [0.0, math.nan]}, "must be a list of numbers, got"),
        ("kimi_linear", {"first_k_dense_replace": "1"}, "must be an integer >= 0, got '1'"),
        ("nemotron_h", {"layers_block_type": 3}, "`layers_block_type` must be a list of strings"),
        ("nemotron_h", {"layers_block_type": []}, "must be a list of 1 or more elements"),
        ("nemotron_h", {"layers_block_type": ""}, "must be a list of strings, got ''"),
        ("nemotron_h", {"hybrid_override_pattern": [["M"]]}, "must be a list of strings"),
        ("granite", {"logits_scaling": 0}, "`logits_scaling` must be > 0, got 0.0"),
        ("recurrent_gemma", {"block_types": []}, "`block_types` must be a list of 1 or more"),
        ("hgrn2", {"expand_ratio": None, "num_heads": 128}, "must be at most hidden_size = 16"),
        ("hgrn", {"expand_ratio": math.inf}, "`expand_ratio` must be a finite number, got inf"),
        ("hgrn", {"expand_ratio": 10**400}, "`expand_ratio` must be a finite number"),
        ("xlstm_7b", {"qk_dim_factor": math.inf}, "`qk_dim_factor` must be a finite number"),
        ("xlstm_7b", {"norm_eps": -1e-6}, "`norm_eps` must be >= 0, got -1e-06"),
        ("falcon_h1", {"mamba_d_ssm": "64"}, "`mamba_d_ssm` must be a positive integer, got '64'"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "must be a list of 5 elements, got"),
        ("qwen3_5_text", {"text_config": 3}, "`text_config` must be an object, got 3"),
        ("mamba", {"model_type": ["x"]}, r"`model_type` must be one of .*, got \['x'\]"),
        ("mamba", {"layer_norm_epsilon": math.nan}, "must be a finite number, got nan"),
        ("mamba", {"layer_norm_epsilon": -1}, "`layer_norm_epsilon` must be >= 0, got -1"),
        ("rwkv5", {"head_size_divisor": 0}, "`head_size_divisor` must be > 0, got 0.0"),
        ("bamba", {"attn_layer_indices": [True]}, "must be a list of integers"),
        ("granite_rope", {"rope_scaling": YARN}, "`rope_type` must be 'default', got 'yarn'"),
        ("granite_rope", {"rope_scaling": {"factor": 4.0}}, "`factor` must be 1, got 4.0"),
        ("granite_rope", {"rope_scaling": {"type": "linear"}}, "must be 'default', got 'linear'"),
    ],
)
def test_values_of_fields_end_with_one_line(name, config, message):
    values = fields(name)
    if "hybrid_override_pattern" in config:
        values = {k: v for k, v in values.items() if k not in ("layers_block_type", "layer_types")}
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.read_model(values | config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("load: ")


def test_rope_scaling_comes_first():
    """Check the order of the reference: `rope_scaling or rope_parameters`."""
    old, new = ({"rope_theta": theta} for theta in (1e4, 1e6))
    assert Config({"rope_parameters": new}).rope(1e5) == (1e6, 1.0)
    assert Config({"rope_scaling": old, "rope_parameters": new}).rope(1e5) == (1e4, 1.0)
    for empty in (None, {}):
        assert Config({"rope_scaling": empty, "rope_parameters": new}).rope(1e5) == (1e6, 1.0)


def test_infinity_is_a_limit_only():
    limits = {"x": [0.0, {"__float__": "Infinity"}]}
    assert Config(limits).list_of("x", float, length=2) == [0.0, math.inf]
    with pytest.raises(ValueError, match="`x` must be a number, got"):
        Config({"x": {"__float__": [1]}}).number("x")


def test_a_model_without_a_checkpoint_has_no_table():
    block = models.Block(layers.DeltaNet(8, heads=2))
    model = models.LanguageModel(8, models.Backbone([block], depth=1))
    with pytest.raises(ValueError, match="abstract_params: `model` must come from"):
        pretrained.abstract_params(model)


def test_downloads_have_the_chat_template_and_errors_are_one_line(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        if name == "a/lost":
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return str(tmp_path)

    module = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert hub.find_folder("a/model") == pathlib.Path(tmp_path)
    assert {"*.jinja", "*.json", "*.safetensors"} <= set(asked["patterns"])
    with pytest.raises(ValueError, match=r"got 'a/lost'; 404 Client Error\.$"):
        hub.find_folder("a/lost")
