"""Language models of 1.3 and 6.8 billion parameters, for a TPU pod.

    python -m experiments.train --config=experiments/configs/pod.py:gated_deltanet_1b,8k \\
        --distributed
    python -m experiments.plan --config=experiments/configs/pod.py:mamba_1b,131k

The words are a model (`gated_deltanet_1b`, `mamba_1b`, `paragru_1b`, `gated_deltanet_7b`) and the
length of the training windows (`8k`, `131k`).

Hardware: a TPU slice. experiments/README.md lists the memory and traffic that `experiments.plan`
computes for v5e:16x16, v5p:4x4x4 and v6e:16x16. `131k` splits each window of 131,072 bytes over 8
chips. These models have not been trained.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import common, lm

# Word -> (name of the run, layer, fields of config.model, options of the layer).
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gated_deltanet_1b": (
        "gated-deltanet-1.3b",
        "gated_deltanet",
        {"dim": 2048, "depth": 24, "mlp_ratio": 8 / 3},
        {"heads": 16},
    ),
    "mamba_1b": (
        "mamba-1.3b",
        "mamba",
        {"dim": 2048, "depth": 48, "mlp_ratio": 0.0},
        {"state_dim": 16},
    ),
    "paragru_1b": (
        "paragru-1.3b",
        "paragru",
        {"dim": 2048, "depth": 26, "mlp_ratio": 8 / 3},
        {"state_dim": 2048},
    ),
    "gated_deltanet_7b": (
        "gated-deltanet-7b",
        "gated_deltanet",
        {"dim": 4096, "depth": 32, "mlp_ratio": 8 / 3},
        {"heads": 32},
    ),
}
# Word -> (window length, sequences per step, mesh): 2 million bytes per step at 8k, 4 at 131k.
LENGTHS = {
    "8k": (8192, 256, "fsdp=-1"),
    "131k": (131072, 32, "fsdp=-1,sequence=8"),
}
KINDS = {"model": tuple(MODELS), "length": tuple(LENGTHS)}


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a model and a length."""
    words, _ = common.parse(arg, KINDS)
    name, layer, model, options = MODELS[words["model"]]
    length, batch_size, mesh = LENGTHS[words["length"]]
    config = lm.get_config(layer)
    config.update(
        {
            "name": f"pod-{name}-{words['length']}",
            "mesh": mesh,
            "steps": 50_000,
            "save_every": 1000,
            "eval_every": 1000,
            "model": {"dtype": "bfloat16", "remat": True, "scan": True, **model},
            "data": {"length": length, "batch_size": batch_size, "streams": batch_size},
            "optimizer": {"learning_rate": 3e-4, "warmup_steps": 1000},
            "eval": {"lanes": batch_size},
        }
    )
    config.model.options[layer].update(options)
    return config
