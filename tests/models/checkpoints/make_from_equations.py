"""Make the tiny checkpoints whose reference logits come from `equations.py`.

    python -m tests.models.checkpoints.make_from_equations [NAME ...]

All parameters are drawn at random, because zeros and ones hide mistakes.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

from tests.models.checkpoints import equations

FOLDER = pathlib.Path(__file__).parent
LENGTH = 37  # odd, and no multiple of a chunk

FLA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "vocab_size": 32,
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "fuse_norm": True,
    "attn": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DELTA = FLA | {"use_short_conv": True, "conv_size": 4, "allow_neg_eigval": False, "num_heads": 2}
RWKV = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "vocab_size": 32,
    "layer_norm_epsilon": 1e-3,  # other than the constant of the last norm
    "head_size": 8,
    "head_size_divisor": 8,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CASES = {
    "gla": FLA | {"model_type": "gla", "num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "gla_conv": FLA
    | {
        "model_type": "gla",
        "num_heads": 2,
        "expand_k": 1.0,
        "expand_v": 0.5,
        "use_short_conv": True,
        "conv_size": 3,
        "fuse_norm": False,
        "tie_word_embeddings": True,
    },
    "retnet": FLA | {"model_type": "retnet", "num_heads": 2, "expand_k": 0.5, "expand_v": 2.0},
    "hgrn": FLA
    | {"model_type": "hgrn", "num_hidden_layers": 3, "expand_ratio": 2, "use_lower_bound": True},
    "hgrn2": FLA
    | {
        "model_type": "hgrn2",
        "num_hidden_layers": 3,
        "num_heads": 2,
        "expand_ratio": 8,
        "use_lower_bound": True,
        "norm_eps": 1e-3,
    },
    "delta_net": DELTA
    | {"model_type": "delta_net", "expand_k": 0.5, "expand_v": 1.0, "use_gate": False},
    "gated_deltanet": DELTA
    | {
        "model_type": "gated_deltanet",
        "head_dim": 4,
        "expand_v": 2.0,
        "num_v_heads": 4,
        "use_gate": True,
    },
    "kda": DELTA | {"model_type": "kda", "head_dim": 8, "expand_v": 0.5, "lower_bound": None},
    "kda_bounded": DELTA
    | {
        "model_type": "kda",
        "num_hidden_layers": 1,
        "head_dim": 4,
        "expand_v": 1.0,
        "num_v_heads": 4,
        "allow_neg_eigval": True,
        "safe_gate": True,
        "lower_bound": -5.0,
    },
    "rwkv5": RWKV | {"model_type": "rwkv5"},
    "rwkv6": RWKV | {"model_type": "rwkv6"},
}


def draw(name, shape, rng):
    """Draw values of the magnitudes that training reaches."""
    normal = rng.standard_normal(shape)
    if name.endswith("dt_bias"):
        dt = np.exp(rng.uniform(np.log(5e-4), np.log(0.5), shape))
        return dt + np.log(-np.expm1(-dt))
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.5, 8, shape))
    if name.endswith("time_decay"):
        return 2 * normal - 2
    if ("time_mix" in name or "time_maa" in name) and shape[0] == 1:
        return rng.uniform(0, 1, shape)
    if any(part in name.split(".")[-2] for part in ("norm", "ln")):
        return (0 if name.endswith("bias") else 1) + 0.3 * normal
    if len(shape) == 3 and shape[1] == 1:  # a convolution
        return 0.5 * normal
    if len(shape) < 2:
        return 0.3 * normal
    if name.endswith(("_w1", "_w2")):  # stored [in, out]
        return normal * shape[-2] ** -0.5
    return normal if "lower_bounds" in name else normal * shape[-1] ** -0.5


def make(config, folder, seed):
    """Write config.json, model.safetensors and logits.npz."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: draw(name, shape, rng).astype(np.float32)
        for name, shape in sorted(equations.shapes(config).items())
    }
    tokens = rng.integers(0, config["vocab_size"], (2, LENGTH))
    logits = equations.logits(config, tensors, tokens).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez(folder / "logits.npz", tokens=tokens, logits=logits)
    return np.abs(logits).max()


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        largest = make(CASES[case], FOLDER / case, sum(case.encode()))
        sys.stdout.write(f"{case}: largest logit {largest:.2f}\n")
