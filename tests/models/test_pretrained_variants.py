"""Config fields, tensor names, errors and shardings of xLSTM, RWKV-4 to -6 and fla-hub."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax import pretrained
from tests.models.checkpoints import make_from_equations
from tests.models.test_pretrained import FOLDER, TOLERANCE, edited, load

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gla", {"num_heads": 4, "expand_k": 1.0, "expand_v": 2.0, "norm_eps": 1e-2}),
        ("retnet", {"num_heads": 1, "expand_k": 1.0, "fuse_norm": False}),
        ("hgrn", {"use_lower_bound": False, "expand_ratio": 1, "num_hidden_layers": 1}),
        ("hgrn2", {"use_lower_bound": False, "expand_ratio": 4, "tie_word_embeddings": True}),
        ("delta_net", {"use_gate": True, "allow_neg_eigval": True, "conv_size": 2}),
        ("gated_deltanet", {"use_gate": False, "num_v_heads": None, "expand_v": 0.5}),
        ("kda", {"num_v_heads": 6, "expand_v": 1.5, "num_heads": 3, "head_dim": 6}),
        ("rwkv5", {"head_size": 4, "head_size_divisor": 2, "intermediate_size": 9}),
        ("rwkv6", {"hidden_size": 24, "layer_norm_epsilon": 1e-5, "num_hidden_layers": 3}),
    ],
)
def test_other_configs_give_the_logits_of_the_equations(name, config, tmp_path):
    make_from_equations.make(make_from_equations.CASES[name] | config, tmp_path, seed=1)
    model, params = pretrained.load(tmp_path)
    stored = np.load(tmp_path / "logits.npz")
    got, _ = jax.jit(model.apply)(params, jnp.asarray(stored["tokens"], jnp.int32))
    np.testing.assert_allclose(got, stored["logits"], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("xlstm_7b", {"use_bias": True}, "`use_bias` must be False, got True"),
        ("xlstm_7b", {"weight_mode": "x"}, "`weight_mode` must be 'single' or 'fused', got 'x'"),
        ("xlstm_7b", {"embedding_dim": 8}, "`embedding_dim` must be 16, got 8"),
        (
            "xlstm_7b",
            {"qk_dim_factor": 0.2},
            "`qk_dim_factor` must give a multiple of num_heads = 2",
        ),
        ("xlstm_7b", {"gate_soft_cap": 0}, "`gate_soft_cap` must be > 0, got 0"),
        ("xlstm_7b", {"eps": -1.0}, "`eps` must be >= 0, got -1.0"),
        (
            "xlstm_7b",
            {"weight_mode": "fused"},
            "must have the tensor .*qkv_opreact.weight`, got none",
        ),
        ("rwkv", {"attention_hidden_size": 8}, "`attention_hidden_size` must be 16, got 8"),
        ("rwkv", {"intermediate_size": 13}, r"feed_forward.key.weight` must have shape \[13, 16\]"),
        ("rwkv5", {"head_size": 3}, "`head_size` must divide hidden_size = 16, got 3"),
        ("rwkv6", {"proj_low_rank_dim": 8}, "`proj_low_rank_dim` must be absent, got 8"),
        ("rwkv6", {"time_mix_extra_dim": 4}, r"time_maa_w1` must have shape \[16, 20\]"),
        ("gla", {"num_kv_heads": 1}, "`num_kv_heads` must be None or 2, got 1"),
        ("gla", {"feature_map": "relu"}, "`feature_map` must be None, got 'relu'"),
        ("gla", {"use_output_gate": False}, "`use_output_gate` must be True, got False"),
        ("gla", {"attn": {"layers": [0]}}, "`attn` must be None, got"),
        ("gla", {"hidden_act": "powlu"}, "`hidden_act` must be 'swish' or 'silu', got 'powlu'"),
        ("gla", {"expand_k": 0.3}, "`expand_k` must give a multiple of num_heads = 2 features"),
        ("gla", {"use_short_conv": True}, "must have the tensor .*q_conv1d.weight`, got none"),
        ("retnet", {"expand_k": 0.375}, "`expand_k` must give an even number of features per head"),
        ("hgrn", {"use_short_conv": True}, "`use_short_conv` must be False, got True"),
        ("hgrn", {"expand_ratio": 1.01}, "`expand_ratio` must give an integer number of channels"),
        ("hgrn", {"num_hidden_layers": 2}, "must not have the tensor"),
        ("hgrn2", {"expand_ratio": 3}, "`expand_ratio` must divide hidden_size = 16, got 3"),
        ("delta_net", {"qk_norm": "sum"}, "`qk_norm` must be 'l2', got 'sum'"),
        ("delta_net", {"use_beta": False}, "`use_beta` must be True, got False"),
        ("gated_deltanet", {"num_v_heads": 3}, "`num_v_heads` must be a multiple of num_heads = 2"),
        ("gated_deltanet", {"expand_v": 0.3}, "`expand_v` must give an integer number of features"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "must be 'swish' or 'silu', got"),
        ("kda", {"safe_gate": True}, "must have the field `lower_bound`, got none"),
        ("kda", {"lower_bound": 1.0}, "`lower_bound` must be < 0, got 1.0"),
        ("kda", {"head_dim": 4}, r"must have shape \[8, 16\] .*, got \[16, 16\]"),
    ],
)
def test_errors_name_the_field_or_the_tensor(name, config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(edited(tmp_path, name, config))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("load: ")


AUTHORS = {
    "rwkv.": "",
    "embeddings": "emb",
    "pre_ln": "ln0",
    "attention.": "att.",
    "feed_forward.": "ffn.",
    "time_faaaa": "time_first",
    **{
        f"time_mix_{name}": f"time_mix_{name[0]}" for name in ("key", "value", "receptance", "gate")
    },
}


@pytest.mark.parametrize("name", ["rwkv", "rwkv5", "rwkv6"])
def test_names_of_the_authors_of_rwkv_are_accepted(name, tmp_path):
    model, expected, *_ = load(name)
    arrays = safetensors.load_file(FOLDER / name / "model.safetensors")
    renamed = {}
    for tensor, value in arrays.items():
        for published, authors in AUTHORS.items():
            tensor = tensor.replace(published, authors)
        renamed[tensor] = value
    again, params = pretrained.load(edited(tmp_path, name, drop=list(arrays), **renamed))
    assert again.backbone == model.backbone
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_both_names_of_the_norm_before_the_gate_are_accepted(tmp_path):
    _, expected, *_ = load("gla")
    arrays = safetensors.load_file(FOLDER / "gla" / "model.safetensors")
    old = [name for name in arrays if "g_norm_swish_gate" in name]
    new = {name.replace("g_norm_swish_gate", "g_norm"): arrays[name] for name in old}
    _, params = pretrained.load(edited(tmp_path, "gla", drop=old, **new))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_both_shapes_of_the_decays_of_kda_are_accepted(tmp_path):
    _, expected, *_ = load("kda")
    arrays = safetensors.load_file(FOLDER / "kda" / "model.safetensors")
    old = {name: value.reshape(1, 1, -1, 1) for name, value in arrays.items() if "A_log" in name}
    folder = edited(tmp_path, "kda", **old)
    model, params = pretrained.load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    pretrained.save(model, params, tmp_path / "copy")
    copy = safetensors.load_file(tmp_path / "copy" / "model.safetensors")
    for name, value in old.items():
        np.testing.assert_array_equal(copy[name], value)


@pytest.mark.parametrize("field", [{"num_heads": None}, {"num_heads": 2, "expand_ratio": None}])
def test_hgrn2_takes_heads_or_features_per_head(field, tmp_path):
    model, *_ = load("hgrn2")
    assert pretrained.load(edited(tmp_path, "hgrn2", field))[0].backbone == model.backbone
