"""Published checkpoints: reference logits, states, export, shardings and errors.

`tests/models/checkpoints/make.py` made the checkpoints and their logits with transformers, and
`make_from_equations.py` those of families that transformers does not have.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqjax import methods, pretrained

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
CAPACITY = 64  # of attention caches, more than any sequence here
TOLERANCE = {"atol": 1e-4, "rtol": 0}
# One checkpoint of each kind of block; the others share its code and run in the slow tests.
KINDS = {
    *("mamba", "mamba2", "qwen3_5_text", "falcon_h1", "recurrent_gemma", "rwkv6", "rwkv7", "hgrn2"),
    *("xlstm_7b", "zamba2", "kimi_linear", "nemotron_h_moe"),
}
assert set(CASES) > KINDS


def checkpoints(quick):
    """Parametrize by all checkpoints; those not in `quick` are slow."""
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in CASES}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


def load(name, **options):
    model, params = pretrained.load(FOLDER / name, capacity=CAPACITY, **options)
    stored = np.load(FOLDER / name / "logits.npz")
    return model, params, jnp.asarray(stored["tokens"], jnp.int32), stored["logits"]


def edited(tmp_path, name, config=None, drop=(), **tensors):
    """Return a copy of a checkpoint with other config fields and tensors."""
    folder = tmp_path / "edited"
    shutil.copytree(FOLDER / name, folder)
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    arrays = safetensors.load_file(folder / "model.safetensors")
    arrays = {k: v for k, v in arrays.items() if k not in drop} | tensors
    safetensors.save_file(arrays, folder / "model.safetensors")
    return folder


@checkpoints(KINDS)
def test_logits_are_those_of_the_reference(name):
    model, params, tokens, logits = load(name)
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)
    assert jax.tree.structure(params) == jax.tree.structure(model.param_roles())
    assert jax.tree.map(jnp.shape, params) == model.param_shapes()


@checkpoints({"mamba2", "qwen3_5_text"})
def test_steps_pieces_and_resets_are_the_whole(name):
    model, params, tokens, logits = load(name)
    length = tokens.shape[1]

    @jax.jit
    def steps(tokens, reset):
        def one(state, now):
            logits, state = model.step(params, now[0], state, now[1])
            return state, logits

        first = model.initial_state(len(tokens))
        state, logits = jax.lax.scan(one, first, (tokens.T, reset.T))
        return jnp.swapaxes(logits, 0, 1), state

    none = jnp.zeros(tokens.shape, bool)
    got, _ = steps(tokens, none)
    np.testing.assert_allclose(got, logits, **TOLERANCE)

    # A prefill of one piece, then steps.
    apply = jax.jit(model.apply)
    head, state = apply(params, tokens[:, :20])
    tail, _ = apply(params, tokens[:, 20:], state)
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), logits, **TOLERANCE)

    # Padding on the left of the first row and a second document in the second one.
    padding = 5
    ragged = jnp.stack(
        [
            jnp.concatenate([jnp.full(padding, 7), tokens[0, : length - padding]]),
            jnp.concatenate([tokens[0, :11], tokens[1, : length - 11]]),
        ]
    )
    reset = none.at[0, padding].set(True).at[1, 11].set(True)
    for run in (lambda: apply(params, ragged, None, reset), lambda: steps(ragged, reset)):
        got, _ = run()
        np.testing.assert_allclose(got[0, padding:], logits[0, :-padding], **TOLERANCE)
        np.testing.assert_allclose(got[1, :11], logits[0, :11], **TOLERANCE)
        np.testing.assert_allclose(got[1, 11:], logits[1, :-11], **TOLERANCE)


@checkpoints({"mamba2", "qwen3_5_text"})
def test_stacked_blocks_and_exports_are_the_same(name, tmp_path):
    model, params, tokens, logits = load(name, scan=True)
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)

    pretrained.save(model, params, tmp_path / "stacked", shard_bytes=5_000)
    plain, plain_params, *_ = load(name)
    pretrained.save(plain, plain_params, tmp_path / "plain")
    original = safetensors.load_file(FOLDER / name / "model.safetensors")
    exported = safetensors.load_file(tmp_path / "plain" / "model.safetensors")
    assert exported.keys() == original.keys()
    for tensor, value in original.items():
        np.testing.assert_array_equal(exported[tensor], value, err_msg=tensor)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == json.loads((FOLDER / name / "config.json").read_text())

    assert len(list((tmp_path / "stacked").glob("*.safetensors"))) > 1
    again, params_again = pretrained.load(tmp_path / "stacked", capacity=CAPACITY)
    assert again == plain
    jax.tree.map(np.testing.assert_array_equal, params_again, plain_params)


def test_dtypes():
    model, params, *_ = load("mamba", dtype="bfloat16")
    roles = model.param_roles()
    jax.tree.map(
        lambda role, leaf: role not in ("recurrence", "norm") or leaf.dtype == jnp.float32 or 1 / 0,
        roles,
        params,
    )
    mixer = params["backbone"]["block_0"]["mixer"]
    assert {mixer[name].dtype for name in ("A_log", "dt_bias", "D")} == {jnp.dtype("float32")}
    assert mixer["in_proj"].dtype == params["embedding"].dtype == jnp.bfloat16
    assert model.dtype == "bfloat16"
    with pytest.raises(ValueError, match="`dtype` float64 must have jax_enable_x64"):
        load("mamba", dtype="float64")
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        load("mamba", dtype="int8")


def test_files_in_bfloat16_and_several_shards(tmp_path):
    _, params, *_ = load("mamba")
    model, narrow, *_ = load("mamba", dtype="bfloat16")
    pretrained.save(model, narrow, tmp_path / "narrow", shard_bytes=10_000)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    again, loaded = pretrained.load(tmp_path / "narrow", capacity=CAPACITY)
    assert again.backbone == model.backbone
    assert again.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, loaded, narrow)
    _, wide = pretrained.load(tmp_path / "narrow", dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), wide, params)


TABLE = "backbone.embeddings.weight"
NORM = "backbone.norm_f.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"config": {"model_type": "gpt2"}}, "`model_type` must be one of .*mamba.*, got 'gpt2'"),
        ({"config": {"hidden_size": "24"}}, "`hidden_size` must be a positive integer, got '24'"),
        ({"config": {"hidden_size": None}}, "must have the field `hidden_size`, got none"),
        ({"config": {"hidden_act": "gelu"}}, "`hidden_act` must be 'silu', got 'gelu'"),
        ({"config": {"quantization_config": {"bits": 4}}}, "`quantization_config` must be absent"),
        ({"config": {"hidden_size": 32}}, r"must have shape \[64, 32\] .*, got \[64, 24\]"),
        ({"config": {"num_hidden_layers": 3}}, r"must have the tensor `backbone\.layers\.2\.norm"),
        ({"config": {"num_hidden_layers": 1}}, r"must not have the tensor .* and 9 more"),
        ({"drop": [NORM]}, rf"must have the tensor `{NORM}`, got none"),
        ({"lora": np.zeros(3, "f4")}, "must not have the tensor `lora`"),
        ({NORM: np.zeros(24, "i4")}, f"tensor `{NORM}` must be F32, BF16, F16, got I32"),
        ({NORM: np.zeros(25, "f4")}, rf"`{NORM}` must have shape \[24\] .*, got \[25\]"),
    ],
)
def test_errors_name_the_field_or_the_tensor(edit, message, tmp_path):
    folder = edited(tmp_path, "mamba", **edit)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(folder)
    assert "\n" not in str(caught.value)


def test_other_names_and_tied_heads_are_accepted(tmp_path):
    _, expected, *_ = load("mamba")
    arrays = safetensors.load_file(FOLDER / "mamba" / "model.safetensors")
    renamed = {
        name.replace("backbone.", "model.").replace("embeddings", "embedding"): value
        for name, value in arrays.items()
    }
    other = edited(
        tmp_path, "mamba", drop=list(arrays), **renamed, **{"lm_head.weight": arrays[TABLE]}
    )
    _, params = pretrained.load(other)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_text_model_of_a_vision_language_checkpoint(tmp_path):
    _, expected, tokens, logits = load("qwen3_5_text")
    arrays = safetensors.load_file(FOLDER / "qwen3_5_text" / "model.safetensors")
    outer = {
        name.replace("model.", "model.language_model.", 1): value for name, value in arrays.items()
    }
    text = json.loads((FOLDER / "qwen3_5_text" / "config.json").read_text())
    others = {"model.visual.x.weight": np.ones(3, "f4"), "mtp.layers.0.x": np.ones(3, "i4")}
    folder = tmp_path / "outer"
    folder.mkdir()
    safetensors.save_file(outer | others, folder / "model.safetensors")
    config = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    model, params = pretrained.load(folder, capacity=CAPACITY)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens)[0], logits, **TOLERANCE)
    pretrained.save(model, params, tmp_path / "copy")
    assert safetensors.load_file(tmp_path / "copy" / "model.safetensors").keys() == outer.keys()
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config


def test_the_fused_shifts_of_older_rwkv_files(tmp_path):
    _, expected, *_ = load("rwkv7")
    arrays = safetensors.load_file(FOLDER / "rwkv7" / "model.safetensors")
    fused = {
        f"model.layers.{i}.attn.x_x": np.concatenate(
            [arrays[f"model.layers.{i}.attn.x_{name}"][0] for name in "rwkvag"]
        )
        for i in range(3)
    }
    old = [name for name in arrays if ".attn.x_" in name]
    _, params = pretrained.load(edited(tmp_path, "rwkv7", drop=old, **fused))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen3_5_text", YARN, "`rope_type` must be 'default', got 'yarn'"),
        ("qwen3_5_text", {"attn_output_gate": False}, "`attn_output_gate` must be True, got False"),
        ("qwen3_5_text", {"num_hidden_layers": 5}, "must have num_hidden_layers = 5 entries"),
        ("qwen3_5_text", {"layer_types": ["x"] * 3}, "must have entries of .*, got 'x'"),
        ("qwen3_5_text", {"num_attention_heads": 2}, r"q_proj.weight` must have shape \[64, 24\]"),
        ("granite", {"num_local_experts": 8}, r"must have the tensor `.*sparse_moe.input_linear"),
        ("granite", {"mamba_d_head": 7}, "`mamba_d_head` must be the inner width over .*, got 7"),
        ("bamba", {"attention_bias": True}, "`attention_bias` must be False, got True"),
        ("nemotron_h", {"layers_block_type": ["x"]}, "must have entries of .*, got 'x'"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, "`mlp_multipliers` must be a list of 2 elements"),
        ("rwkv7", {"norm_bias": False}, "`norm_bias` must be True, got False"),
        ("rwkv7", {"decay_low_rank_dim": 6}, r"w_lora.lora.0.weight` must have shape \[6, 24\]"),
        ("recurrent_gemma", {"block_types": ["x"]}, "entries of 'recurrent' and 'attention'"),
    ],
)
def test_errors_of_families_name_the_field_or_the_tensor(name, config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(edited(tmp_path, name, config))
    assert "\n" not in str(caught.value)


def test_older_names_of_config_fields_are_accepted(tmp_path):
    """Check `layers_block_type`, top-level `rope_theta`, and infinity as an object."""
    new, _ = pretrained.load(FOLDER / "qwen3_5_text")
    config = json.loads((FOLDER / "qwen3_5_text" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {
        "rope_parameters": None,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "layer_types": None,
        "layers_block_type": config["layer_types"],
    }
    again, _ = pretrained.load(edited(tmp_path / "qwen", "qwen3_5_text", old))
    assert again.backbone == new.backbone
    pattern = {"layers_block_type": None, "hybrid_override_pattern": "M-*-"}
    (tmp_path / "nemotron").mkdir()
    again, _ = pretrained.load(edited(tmp_path / "nemotron", "nemotron_h", pattern))
    assert again.backbone == pretrained.load(FOLDER / "nemotron_h")[0].backbone
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    (tmp_path / "mamba2").mkdir()
    again, _ = pretrained.load(edited(tmp_path / "mamba2", "mamba2", limit))
    assert again.backbone == pretrained.load(FOLDER / "mamba2")[0].backbone


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder with config.json, or a name"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must have a config.json, got none"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be valid JSON"):
        pretrained.load(tmp_path)
    shutil.copy(FOLDER / "mamba" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"or model.safetensors.index.json, got neither"):
        pretrained.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin; pickle files can run code"):
        pretrained.load(tmp_path)
    whole = (FOLDER / "mamba" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors must be a complete safetensors file"):
        pretrained.load(tmp_path)
    index = {"weight_map": {TABLE: "model.safetensors", "lost": "model.safetensors"}}
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must have the tensor `lost`, which the index lists"):
        pretrained.load(tmp_path)
    index["weight_map"]["lost"] = "other.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists the file 'other.safetensors'"):
        pretrained.load(tmp_path)


def test_saving_refuses_what_it_cannot_write(tmp_path):
    model, params, *_ = load("mamba")
    with pytest.raises(ValueError, match=r"must have no safetensors files, got model.safetensors"):
        pretrained.save(model, params, FOLDER / "mamba")
    with pytest.raises(ValueError, match="`params` must be a dict with the entries"):
        pretrained.save(model, {}, tmp_path)
    with pytest.raises(ValueError, match=r"`model` must come from seqjax.pretrained.load"):
        pretrained.save(model.backbone, params["backbone"], tmp_path)


def with_mixer(model, **changes):
    """Return a model whose blocks have a mixer with other options."""
    (block,) = model.backbone.blocks
    block = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **changes))
    return dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, blocks=block))


def test_saving_refuses_options_that_the_config_lacks(tmp_path):
    model, params, *_ = load("mamba2")
    got = r"` of the model must be that of its config.json, .*, got .*, which the format cannot"
    mixer = "`backbone.block_0.mixer."
    for changed, field in (
        (with_mixer(model, decay_factor=0.5), mixer + "decay_factor"),
        (with_mixer(model, write_factor=0.5), mixer + "write_factor"),
        (with_mixer(model, state_limit=methods.StateNorm(1.0)), mixer + "state_limit"),
        (dataclasses.replace(model, logit_cap=30.0), "`logit_cap"),
        (
            dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, norm_eps=0.1)),
            "`backbone.norm_eps",
        ),
    ):
        with pytest.raises(ValueError, match=f"^save: {field}{got}"):
            pretrained.save(changed, params, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    backbone = dataclasses.replace(model.backbone, remat=True)
    same = dataclasses.replace(model, backbone=backbone, dtype="bfloat16")
    pretrained.save(same, params, tmp_path / "copy")
    assert pretrained.read_model(tmp_path / "copy").backbone == model.backbone


def test_a_folder_never_reaches_for_the_network(monkeypatch):
    """Check that a folder is read without sockets and without the hub's package."""
    import socket
    import sys

    def refuse(*args, **keywords):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    load("mamba")
    with pytest.raises(ImportError, match="huggingface_hub must be installed"):
        pretrained.load("state-spaces/mamba-130m-hf")


def test_half_precision_files_are_read(tmp_path):
    arrays = safetensors.load_file(FOLDER / "mamba" / "model.safetensors")
    for index, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        narrow = {name: value.astype(dtype) for name, value in arrays.items()}
        folder = edited(tmp_path / str(index), "mamba", **narrow)
        model, params = pretrained.load(folder)
        assert model.dtype == np.dtype(dtype).name
        _, wide = pretrained.load(folder, dtype="float32")
        np.testing.assert_array_equal(
            np.asarray(params["embedding"]).astype("f4"), wide["embedding"]
        )
        np.testing.assert_array_equal(wide["embedding"], narrow[TABLE].astype("f4"))
