"""Published models of several billion parameters, to plan their fine-tuning on a TPU slice.

    python -m experiments.plan --config=experiments/configs/published.py:qwen3.5-27b,lora
    python -m experiments.plan --table=published

The words are a model and what is trained. The sizes are those of the published configurations; no
weights are read. Use experiments/configs/finetune.py to fine-tune.

Hardware: experiments/README.md lists the slice and the memory that `experiments.plan` computes.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import common, finetune

# Word -> fields of config.json. Fields with the default of the reference are left
# out, and those that do not change sizes (Falcon-H1: multipliers and rotary base).
MODELS: dict[str, dict[str, Any]] = {
    "qwen3.5-27b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
        },
        "vocab_size": 248_320,
        "tie_word_embeddings": False,
    },
    "falcon-h1-34b": {
        "model_type": "falcon_h1",
        "hidden_size": 5120,
        "intermediate_size": 21504,
        "num_hidden_layers": 72,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "mamba_d_ssm": 4096,
        "mamba_n_heads": 32,
        "mamba_d_head": 128,
        "mamba_d_state": 256,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "vocab_size": 261_120,
        "tie_word_embeddings": False,
    },
    "mamba2-2.7b": {
        "model_type": "mamba2",
        "hidden_size": 2560,
        "num_heads": 80,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "num_hidden_layers": 64,
        "vocab_size": 50_288,
        "tie_word_embeddings": True,
    },
}
TRAINED = {"lora": 16, "full": 0}
# (Model, what is trained) -> (topology, mesh, tokens of a window, windows of a step).
SLICES = {
    ("qwen3.5-27b", "lora"): ("v5p:2x2x1", "fsdp=4", 4096, 4),
    ("qwen3.5-27b", "full"): ("v5p:2x2x4", "fsdp=16", 4096, 16),
    ("falcon-h1-34b", "lora"): ("v5p:2x2x1", "fsdp=4", 4096, 4),
    ("falcon-h1-34b", "full"): ("v5p:2x2x4", "fsdp=16", 4096, 16),
    ("mamba2-2.7b", "lora"): ("v5e:2x2", "fsdp=4", 2048, 4),
    ("mamba2-2.7b", "full"): ("v5e:2x4", "fsdp=8", 2048, 8),
}
KINDS = {"model": tuple(MODELS), "trained": tuple(TRAINED)}


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a model, and `lora` or `full`."""
    words, _ = common.parse(arg, KINDS)
    model, trained = words["model"], words["trained"]
    topology, mesh, length, batch_size = SLICES[model, trained]
    config = finetune.get_config()
    config.update({"name": f"{model}-{trained}", "mesh": mesh})
    config.model.update(lora_rank=TRAINED[trained], dtype="bfloat16", scan=True)
    config.data.update(length=length, batch_size=batch_size)
    # Not a field of the defaults, because the fields of the models differ.
    config.published = ConfigDict({"topology": topology, "config": MODELS[model]})
    return config
