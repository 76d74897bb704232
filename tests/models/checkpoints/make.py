"""Make the tiny checkpoints of this folder and their reference logits. Requires torch.

    python tests/models/checkpoints/make.py [NAME ...]

Run it with torch 2.13, transformers 5.24 and, for RWKV, rwkv 0.8.32. All parameters are drawn at
random, because zeros and ones hide mistakes. The logits are those of the full forward pass in
float32, without a cache.
"""

import importlib
import json
import math
import os
import pathlib
import sys
import tempfile

os.environ["PYTORCH_JIT"] = "0"  # so that `make_rwkv7` can replace a function of torch

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
LENGTH = 37  # odd, and no multiple of a chunk

MAMBA2 = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
}
QWEN = {
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
XLSTM = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 2,
    "ffn_round_up_to_multiple_of": 12,
    "eps": 0.05,  # large enough to see
    "norm_eps": 1e-3,
}
CASES = {
    "mamba": {"model_type": "mamba", "state_size": 5, "time_step_rank": 3},
    "mamba_biases": {
        "model_type": "mamba",
        "state_size": 4,
        "expand": 3,
        "conv_kernel": 3,
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
    },
    "falcon_mamba": {"model_type": "falcon_mamba", "state_size": 4, "mixer_rms_eps": 1e-3},
    "qwen3_5_text": {"model_type": "qwen3_5_text", **QWEN},
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 6,
        "head_dim": 8,
        "state_size": 5,
        "n_groups": 2,
    },
    "mamba2_limits": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 12,
        "state_size": 3,
        "n_groups": 1,
        "use_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.01, 0.1],
    },
    "granite": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "shared_intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        **MAMBA2,
    },
    "granite_rope": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "shared_intermediate_size": 20,
        "num_attention_heads": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "position_embedding_type": "rope",
        "tie_word_embeddings": True,
        "mamba_proj_bias": True,
        **MAMBA2,
    },
    "bamba": {
        "model_type": "bamba",
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "attn_layer_indices": [1],
        "mlp_bias": True,
        **MAMBA2,
        "mamba_n_heads": 8,
    },
    "nemotron_h": {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 20,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 5,
    },
    "falcon_h1": {
        "model_type": "falcon_h1",
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 40,
        "mamba_rms_norm": False,
        "mamba_proj_bias": True,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "mlp_multipliers": [0.7, 1.3],
        "key_multiplier": 1.6,
        "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.2,
        "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 0.9],
        "ssm_in_multiplier": 1.4,
        "ssm_out_multiplier": 0.6,
        **MAMBA2,
        "mamba_n_heads": 5,
        "mamba_n_groups": 1,
    },
    "falcon_h1_norm_first": {
        "model_type": "falcon_h1",
        "num_hidden_layers": 1,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "mamba_d_ssm": 48,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": True,
        "tie_word_embeddings": True,
        **MAMBA2,
    },
    "rwkv7": {
        "model_type": "rwkv7",
        "num_hidden_layers": 3,
        "head_dim": 8,
        "num_heads": 3,
        "intermediate_size": 40,
        "decay_low_rank_dim": 5,
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 3,
        "gate_low_rank_dim": 6,
        "hidden_act": "sqrelu",
        "norm_eps": 1e-5,
        "norm_bias": True,
        "norm_first": True,
        "attn": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    "lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 60,
        "block_multiple_of": 16,
        "conv_bias": True,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "olmo_hybrid": {
        "model_type": "olmo_hybrid",
        "pad_token_id": 0,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
    },
    "rwkv": {
        "model_type": "rwkv",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 1e-3,
        "rescale_every": 0,  # otherwise the reference changes its weights when it runs
    },
    "xlstm_7b": {"model_type": "xlstm", **XLSTM},
    "xlstm_7b_fused": {
        "model_type": "xlstm",
        **XLSTM,
        "num_hidden_layers": 1,
        "weight_mode": "fused",
        "qk_dim_factor": 1.0,
        "v_dim_factor": 0.5,
        "gate_soft_cap": 3.0,
        "output_logit_soft_cap": 2.0,
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "lru_width": 40,
        "intermediate_size": 40,
        "attention_window_size": 9,
        "logits_soft_cap": 3.0,
    },
}
COMMON = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2}


def draw(name, parameter, generator):
    """Draw values of the magnitudes that training reaches."""

    def normal():
        return torch.randn(parameter.shape, generator=generator)

    def log_uniform(low, high):
        share = torch.rand(parameter.shape, generator=generator)
        return torch.exp(math.log(low) + share * math.log(high / low))

    if name.endswith(("dt_bias", "dt_proj.bias")):
        dt = log_uniform(5e-4, 0.5)
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith("recurrent_param"):
        return 0.5 * normal()
    if name.endswith("A_log"):
        return torch.log(log_uniform(0.5, 16))
    if name.endswith("time_decay"):
        return 2 * normal() - 2
    if "time_mix" in name:
        return torch.rand(parameter.shape, generator=generator)
    if "gate_preact" in name:  # wide enough for the maximum
        return normal() if name.endswith("bias") else 0.4 * normal()
    if name.endswith(".D") or any(part in name.split(".")[-2] for part in ("norm", "ln")):
        return (0 if name.endswith("bias") else 1) + 0.3 * normal()
    if parameter.ndim == 3 and parameter.shape[1] == 1:  # a convolution
        return 0.5 * normal()
    if parameter.ndim < 2:
        return 0.3 * normal()
    return normal() * parameter.shape[-1] ** -0.5


def make_rwkv7(name):
    """Write one case with the names of fla-hub, and the logits of the authors' package."""
    os.environ["RWKV_V7_ON"] = "1"
    import rwkv.model
    from safetensors.torch import save_file

    config = COMMON | CASES[name]
    dim, width, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(sum(name.encode()))
    published, authors = {}, {}

    def add(stored, theirs, shape, transpose=False):
        value = draw(stored, torch.empty(shape), generator)
        if stored.endswith(("k_k", "k_a")):
            value = 1 + value
        published[stored] = value
        authors[theirs] = value.T.contiguous() if transpose else value

    def norm(stored, theirs):
        for kind in ("weight", "bias"):
            add(f"{stored}.{kind}", f"{theirs}.{kind}", (dim,))

    add("model.embeddings.weight", "emb.weight", (config["vocab_size"], dim))
    norm("model.layers.0.pre_norm", "blocks.0.ln0")
    ranks = {"w": "decay", "a": "a", "v": "v", "g": "gate"}
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blocks.{i}."
        norm(layer + "attn_norm", block + "ln1")
        norm(layer + "ffn_norm", block + "ln2")
        for letter in "rwkvag":
            add(f"{layer}attn.x_{letter}", f"{block}att.x_{letter}", (1, 1, dim))
        pairs = {"r": "receptance", "k": "key", "v": "value", "o": "output"}
        for letter, theirs in pairs.items():
            add(f"{layer}attn.{letter}_proj.weight", f"{block}att.{theirs}.weight", (dim, dim))
        for letter, field in ranks.items():
            if letter == "v" and i == 0:
                continue
            rank = config[f"{field}_low_rank_dim"]
            lora = f"{layer}attn.{letter}_lora.lora."
            add(f"{lora}0.weight", f"{block}att.{letter}1", (rank, dim), transpose=True)
            add(f"{lora}2.weight", f"{block}att.{letter}2", (dim, rank), transpose=True)
            if letter != "g":
                add(f"{lora}2.bias", f"{block}att.{letter}0", (dim,))
        for letter in ("k_k", "k_a"):
            add(f"{layer}attn.{letter}", f"{block}att.{letter}", (dim,))
        add(f"{layer}attn.r_k", f"{block}att.r_k", (dim // size, size))
        norm(layer + "attn.g_norm", block + "att.ln_x")
        add(f"{layer}ffn.x_k", f"{block}ffn.x_k", (dim,))
        add(f"{layer}ffn.key.weight", f"{block}ffn.key.weight", (width, dim))
        add(f"{layer}ffn.value.weight", f"{block}ffn.value.weight", (dim, width))
    norm("model.norm", "ln_out")
    add("lm_head.weight", "head.weight", (config["vocab_size"], dim))

    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    # The package has the eps of heads of 64 features.
    group_norm = torch.nn.functional.group_norm
    torch.nn.functional.group_norm = lambda *args, **keywords: group_norm(
        *args, **keywords | {"eps": size * config["norm_eps"]}
    )
    with tempfile.TemporaryDirectory() as temporary:
        torch.save(authors, f"{temporary}/model.pth")
        model = rwkv.model.RWKV(f"{temporary}/model", "cpu fp32")
        tokens = torch.randint(0, config["vocab_size"], (2, LENGTH), generator=generator)
        logits = [model.forward(row.tolist(), None, full_output=True)[0] for row in tokens]
    finish(folder, tokens, torch.stack(logits))


def make(name):
    """Write config.json, model.safetensors and logits.npz of one case."""
    values = {**COMMON, **CASES[name]}
    kind = values.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **values)
    config._attn_implementation = "eager"
    if kind == "xlstm":  # the reference cannot initialize fused weights
        modeling_xlstm = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
        modeling_xlstm.xLSTMPreTrainedModel._init_weights = lambda *_: None
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(draw(path, parameter, generator))
    for module in model.modules():
        if kind == "nemotron_h" and hasattr(module, "time_step_limit"):
            # transformers ignores the config's limit and uses `time_step_min`.
            module.time_step_limit = tuple(config.time_step_limit)
    tokens = torch.randint(0, values["vocab_size"], (2, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert logits.dtype == torch.float32
    folder = FOLDER / name
    model.save_pretrained(folder)
    if kind == "olmo_hybrid":
        rename_as_published(folder / "model.safetensors", config.layer_types)
    (folder / "generation_config.json").unlink(missing_ok=True)
    finish(folder, tokens, logits)


def rename_as_published(path, kinds):
    """Give norms of attention layers the name that transformers reads, not the one it writes."""
    from safetensors.torch import load_file, save_file

    arrays = load_file(path)
    for i, kind in enumerate(kinds):
        prefix = f"model.layers.{i}."
        if kind == "full_attention":
            value = arrays.pop(prefix + "feedforward_layer_norm.weight")
            arrays[prefix + "post_attention_layernorm.weight"] = value
    save_file(arrays, path, metadata={"format": "pt"})


def finish(folder, tokens, logits):
    """Write the logits and the size of the folder."""
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
    (folder / "model.safetensors").chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    largest = logits.abs().max()
    sys.stdout.write(f"{folder.name}: {size / 1e3:.0f} kB, largest logit {largest:.2f}\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        (make_rwkv7 if CASES[case]["model_type"] == "rwkv7" else make)(case)
