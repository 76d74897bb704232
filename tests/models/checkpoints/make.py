"""Make the tiny checkpoints of this folder and their reference logits. Requires torch.

    python tests/models/checkpoints/make.py [NAME ...]

Run it with torch 2.13 and transformers 5.24. All parameters are drawn at random, because zeros and
ones hide mistakes. The logits are those of the full forward pass in float32, without a cache.
"""

import math
import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
LENGTH = 37  # odd, and no multiple of a chunk

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
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
    if name.endswith("A_log"):
        return torch.log(log_uniform(0.5, 16))
    if name.endswith(".D") or "norm" in name.split(".")[-2]:
        return (0 if name.endswith("bias") else 1) + 0.3 * normal()
    if name.endswith("conv1d.weight"):
        return 0.5 * normal()
    if parameter.ndim < 2:
        return 0.3 * normal()
    return normal() * parameter.shape[-1] ** -0.5


def make(name):
    """Write config.json, model.safetensors and logits.npz of one case."""
    values = {**COMMON, **CASES[name]}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(draw(path, parameter, generator))
    tokens = torch.randint(0, values["vocab_size"], (2, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert logits.dtype == torch.float32
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
    size = sum(path.stat().st_size for path in folder.iterdir())
    sys.stdout.write(f"{name}: {size / 1e3:.0f} kB, largest logit {logits.abs().max():.2f}\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
