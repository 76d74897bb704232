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
from dense_cases import DENSE, MAMBA2, QWEN
from expert_cases import expert_cases, stack_as_published
from hybrid_cases import HYBRIDS, drop_constants

FOLDER = pathlib.Path(__file__).parent
# Other draws, where float32 references of the first draw err by more than 5e-5 (in float64).
SEEDS = {"kimi_linear": 3, "qwen3_5_text": 1}
LENGTH = 37  # odd, and no multiple of a chunk

CASES = DENSE | expert_cases(QWEN, MAMBA2) | HYBRIDS
COMMON = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2}


def draw(name, parameter, generator):
    """Draw values of the magnitudes that training reaches."""

    def normal():
        return torch.randn(parameter.shape, generator=generator)

    def log_uniform(low, high):
        share = torch.rand(parameter.shape, generator=generator)
        return torch.exp(math.log(low) + share * math.log(high / low))

    if name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
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
    config._experts_implementation = "eager"  # the default requires multiples of 16 bytes
    if kind == "xlstm":  # the reference cannot initialize fused weights
        modeling_xlstm = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
        modeling_xlstm.xLSTMPreTrainedModel._init_weights = lambda *_: None
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(sum(name.encode()) + SEEDS.get(name, 0))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(draw(path, parameter, generator))
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(draw(path, buffer, generator))
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
    if kind == "minimax":
        drop_constants(folder / "model.safetensors")
    if kind == "qwen3_5_moe_text":
        stack_as_published(folder / "model.safetensors", values["num_experts"])
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
