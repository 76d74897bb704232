"""A tiny checkpoint with random weights, for examples."""

import json
import os
import pathlib

import numpy as np


def write_tiny_mamba(path: str | os.PathLike[str]) -> None:
    """Write a Mamba checkpoint of 2 layers and 32 tokens with random weights to a folder."""
    from safetensors.numpy import save_file

    dim, inner, states, rank, depth = 16, 32, 4, 1, 2
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"backbone.embeddings.weight": draw(32, dim), "backbone.norm_f.weight": 1 + draw(dim)}
    for i in range(depth):
        layer = {
            "norm.weight": 1 + draw(dim),
            "mixer.in_proj.weight": draw(2 * inner, dim),
            "mixer.conv1d.weight": draw(inner, 1, 4),
            "mixer.conv1d.bias": draw(inner),
            "mixer.x_proj.weight": draw(rank + 2 * states, inner),
            "mixer.dt_proj.weight": draw(inner, rank),
            "mixer.dt_proj.bias": draw(inner) - 3,
            "mixer.A_log": np.log(np.tile(np.arange(1, states + 1, dtype=np.float32), (inner, 1))),
            "mixer.D": 1 + draw(inner),
            "mixer.out_proj.weight": draw(dim, inner),
        }
        tensors |= {f"backbone.layers.{i}.{name}": value for name, value in layer.items()}
    config = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": dim,
        "state_size": states,
        "num_hidden_layers": depth,
        "vocab_size": 32,
        "torch_dtype": "float32",
    }
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
