"""Published checkpoints with experts: both formats of the weights, shardings, errors.

`test_pretrained.py` compares their logits, states and exports, as for every checkpoint.
"""

import json
import re

import jax
import numpy as np
import pytest

from seqjax import pretrained, sharding
from tests.models.test_pretrained import CAPACITY, FOLDER, TOLERANCE, edited, load

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def separated(arrays):
    """Return tensors with stacked weights cut into one tensor for each expert."""
    found = {}
    for name, value in arrays.items():
        match = re.fullmatch(r"(.*\.experts\.)(gate_up|up|down)_proj", name)
        if match is None:
            found[name] = value
            continue
        prefix, kind = match.groups()
        kinds = kind.split("_")
        for i, expert in enumerate(value):
            cut = np.split(expert, len(kinds))
            found |= {f"{prefix}{i}.{k}_proj.weight": p for k, p in zip(kinds, cut, strict=True)}
    return found


def stacked(arrays):
    """Return tensors with the weights of the experts stacked, gate before up."""
    found, parts = {}, {}
    for name, value in arrays.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            found[name] = value
        else:
            prefix, i, kind = match.groups()
            parts.setdefault(prefix, {}).setdefault(kind, {})[int(i)] = value
    for prefix, kinds in parts.items():
        for name in ("gate_up" if "gate" in kinds else "up", "down"):
            joined = [np.stack([kinds[k][i] for i in sorted(kinds[k])]) for k in name.split("_")]
            found[f"{prefix}{name}_proj"] = np.concatenate(joined, axis=1)
    return found


def renamed(arrays):
    """Return the tensors of Granite with the names of newer files."""
    names = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }
    old = "block_sparse_moe."
    return {
        next((n.replace(old + a, old + b) for a, b in names.items() if old + a in n), n): value
        for n, value in arrays.items()
    }


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("qwen3_next", stacked),
        ("qwen3_5_moe_text", separated),
        ("granite_moe", renamed),
        ("nemotron_h_moe", stacked),
    ],
)
def test_the_other_format_is_read_and_written(name, convert, tmp_path):
    plain, expected, *_ = load(name)
    arrays = safetensors.load_file(FOLDER / name / "model.safetensors")
    other = convert(arrays)
    assert other.keys() != arrays.keys()
    folder = edited(tmp_path, name, drop=list(arrays), **other)
    for scan in (False, True):
        model, params = pretrained.load(folder, capacity=CAPACITY, scan=scan)
        if not scan:
            assert model.backbone == plain.backbone
            jax.tree.map(np.testing.assert_array_equal, params, expected)
        pretrained.save(model, params, tmp_path / f"copy-{scan}")
        written = safetensors.load_file(tmp_path / f"copy-{scan}" / "model.safetensors")
        assert written.keys() == other.keys()
        for tensor, value in other.items():
            np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)


def test_the_text_model_of_a_vision_language_checkpoint(tmp_path):
    name = "qwen3_5_moe_text"
    _, expected, *_ = load(name)
    arrays = safetensors.load_file(FOLDER / name / "model.safetensors")
    outer = {n.replace("model.", "model.language_model.", 1): v for n, v in arrays.items()}
    text = json.loads((FOLDER / name / "config.json").read_text())
    config = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": True}
    for i, stored in enumerate((outer, separated(outer))):
        folder = tmp_path / str(i)
        folder.mkdir()
        arrays = stored | {"model.visual.x": np.ones(3, "f4")}
        safetensors.save_file(arrays, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        model, params = pretrained.load(folder, capacity=CAPACITY)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        pretrained.save(model, params, folder / "copy")
        assert safetensors.load_file(folder / "copy" / "model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize("experts", [False, True])
def test_a_mesh_splits_the_experts(experts):
    """Check the default rules, and a rule that splits the experts."""
    name = "qwen3_5_moe_text"
    plain, expected, tokens, logits = load(name)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    rules = dict(sharding.RULES) | ({"experts": "tensor"} if experts else {})
    model, params, *_ = load(name, mesh=mesh, rules=rules)
    weight = params["backbone"]["block_0"]["mlp"]["experts"]["up_proj"]
    wanted = ("tensor", "fsdp", None) if experts else (None, "fsdp", "tensor")
    assert weight.sharding.spec == jax.sharding.PartitionSpec(*wanted)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert model == plain
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)


def test_router_outputs_of_a_model():
    """Check that stacked blocks return the extra outputs of the others."""
    model, params, tokens, _ = load("granite_moe")
    *_, aux = jax.jit(model.apply_with_aux)(params, tokens)
    names = ("balance_loss", "router_logits")
    wanted = {f"block_{i}/mlp/{name}" for i in range(2) for name in names}
    assert aux.keys() == wanted
    assert aux["block_1/mlp/router_logits"].shape == (*tokens.shape, 5)
    again, params, *_ = load("granite_moe", scan=True)
    *_, other = jax.jit(again.apply_with_aux)(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other, aux)


def test_caches_have_the_dtype_of_the_model():
    model, params, tokens, _ = load("qwen3_5_moe_text", dtype="bfloat16")
    _, state = jax.jit(model.apply)(params, tokens)
    assert state[1]["k"].dtype == state[1]["v"].dtype == "bfloat16"
    again, *_ = load("qwen3_5_moe_text")
    assert again.initial_state(1)[1]["k"].dtype == "float32"


QWEN, GRANITE, NEMOTRON = "qwen3_next", "granite_moe", "nemotron_h_moe"
DOWN = "model.layers.0.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (QWEN, {"drop": [DOWN]}, f"must have the tensor `{re.escape(DOWN)}`, got none"),
        (QWEN, {DOWN: np.zeros((24, 9), "f4")}, r"3.down_proj.weight` must have shape \[24, 10\]"),
        (QWEN, {DOWN: np.zeros((24, 10), "i4")}, "3.down_proj.weight` must be F32, BF16, F16, got"),
        (QWEN, {"config": {"num_experts": 4}}, r"must not have the tensor `.*experts\.4\.down"),
        (QWEN, {"config": {"num_experts": 6}}, r"must have the tensor `.*experts\.5\.gate"),
        (QWEN, {"config": {"num_experts": -1}}, "`num_experts` must be an integer >= 0, got -1"),
        (QWEN, {"config": {"num_experts_per_tok": 6}}, "must be at most num_experts = 5, got 6"),
        (QWEN, {"config": {"moe_intermediate_size": 9}}, r"must have shape \[9, 24\]"),
        (QWEN, {"config": {"decoder_sparse_step": 0}}, "`decoder_sparse_step` must be a positive"),
        (GRANITE, {"config": {"num_local_experts": 4}}, r"weight` must have shape \[4, 24, 24\]"),
        (GRANITE, {"config": {"num_local_experts": 0}}, "must not have the tensor `.*sparse_moe"),
        (NEMOTRON, {"config": {"n_group": 3}}, "`n_group` must divide n_routed_experts into"),
        (NEMOTRON, {"config": {"topk_group": 5}}, "`topk_group` must be at most n_group = 4, got"),
        (NEMOTRON, {"config": {"num_experts_per_tok": 5}}, "experts to choose from = 4, got 5"),
        (
            NEMOTRON,
            {"config": {"moe_latent_size": 11}},
            r"up_proj.weight` must have shape \[10, 11\]",
        ),
    ],
)
def test_errors_name_the_field_or_the_tensor(name, edit, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(edited(tmp_path, name, **edit))
    assert "\n" not in str(caught.value)
