"""Grids of language models on text."""

from __future__ import annotations

import itertools
import statistics

from experiments.sweeps.jobs import RATE, Grid, Job
from seqjax.layers import REGISTRY

TEXT = "experiments/configs/lm.py"
# MLP ratios that give every model of text 463,000 parameters, as with Mamba, within a percent.
MLP_RATIOS = {
    "lru": 3.0,
    "s5": 3.0,
    "gateloop": 2.0,
    "mamba": 2.0,
    "deltanet": 3.0,
    "gated_deltanet": 2.625,
    "gla": 3.0,
    "attention": 3.0,
    "elman": 3.375,
    "gru": 2.0,
    "lstm": 1.375,
    "paragru": 3.0,
    "paralstm": 3.0,
    "slstm": 2.6875,
    "lem": 1.375,
    "ltc": 3.375,
}
# MLP ratios for eight blocks of width 64: models have 443,000 parameters within 1.5 percent.
DEEP_RATIOS = {"attention": 3.0, "lru": 3.0, "mamba": 1.625, "gated_deltanet": 2.5}
DEEP = {
    "model.depth": 8,
    "steps": 500,
    "data.batch_size": 16,
    "eval.bytes": 1 << 16,
    "eval.final_bytes": 1 << 19,
}
# The .rst files of the Debian package linux-doc-6.1, 24 MB, unpacked into this folder.
LINUX = {"data.path": "linux-doc"}
TIMES = 16  # longest test sequence over training length
# Options that Stuffed Mamba (arXiv 2410.07145) sets after training, against state collapse.
AGAINST_COLLAPSE = {"write_factor": 0.75, "decay_factor": 0.999}


def _deep(label: str, mixers: list[str]) -> Job:
    """Return a job with `mixers` in turn, in eight blocks."""
    ratio = statistics.mean(DEEP_RATIOS[name] for name in mixers)
    models = {"model.mixers": ",".join(mixers), "model.mlp_ratio": ratio}
    return Job(label, f"{TEXT}:{mixers[0]},small", DEEP | models)


GRIDS: dict[str, Grid] = {
    "text": Grid(
        "Bits per byte of Python's standard library, 463,000 parameters, 500 steps of 2,048 bytes",
        tuple(
            Job(layer, f"{TEXT}:{layer}", {"model.mlp_ratio": ratio})
            for layer, ratio in MLP_RATIOS.items()
        ),
        {
            "heldout_bits_per_byte": "bits per byte",
            "heldout_bytes": "held-out bytes",
            "tokens_per_second": "tokens/s",
        },
        "heldout_bits_per_byte",
        lower=True,
        figure="curve",
    ),
    "linux": Grid(
        "Bits per byte of the documentation of Linux, 463,000 parameters, 500 steps of 2,048 bytes",
        tuple(
            Job(layer, f"{TEXT}:{layer}", {"model.mlp_ratio": ratio, RATE: rate} | LINUX)
            for rate, (layer, ratio) in itertools.product((3e-3, 1e-2), MLP_RATIOS.items())
        ),
        {
            "heldout_bits_per_byte": "bits per byte",
            "gzip_bits_per_byte": "gzip",
            "xz_bits_per_byte": "xz",
        },
        "heldout_bits_per_byte",
        lower=True,
    ),
    "hybrid": Grid(
        "Hybrids: bits per byte with one block with attention to 1, 3 or 7 recurrent blocks",
        (
            _deep("attention, 0:1", ["attention"]),
            *(
                _deep(f"{layer}, {count}:1", [*([layer] * count), "attention"])
                for layer in ("lru", "mamba", "gated_deltanet")
                for count in (1, 3, 7)
            ),
            *(_deep(f"{layer}, 1:0", [layer]) for layer in ("lru", "mamba", "gated_deltanet")),
        ),
        {"heldout_bits_per_byte": "bits per byte", "parameters": "parameters"},
        "heldout_bits_per_byte",
        lower=True,
        figure="label",
        axis="recurrent blocks : blocks with attention",
    ),
    "lengths": Grid(
        "Length generalization: bits per byte at 1 to 16 times the training length of 128 bytes",
        (
            *(
                Job(layer, f"{TEXT}:{layer}", {"eval.times": TIMES})
                for layer in (
                    "lru",
                    "s5",
                    "mamba",
                    "mamba2",
                    "mlstm",
                    "gla",
                    "retnet",
                    "deltanet",
                    "gated_deltanet",
                    "rwkv7",
                    "gru",
                    "attention",
                )
            ),
            *(
                Job(
                    f"mamba2, {option.replace('_', ' ')} {value}",
                    f"{TEXT}:mamba2",
                    {"eval.times": TIMES, f"eval.options.mamba2.{option}": value},
                )
                for option, value in AGAINST_COLLAPSE.items()
            ),
        ),
        {f"bits_per_byte_{128 * n}": f"T = {128 * n:,}" for n in (1, 2, 4, 8, 16)},
        f"bits_per_byte_{128 * TIMES}",
        lower=True,
        figure="length",
        axis="bytes since the start of the sequence",
    ),
    "layers": Grid(
        "Every layer: bits per byte after 200 steps of 1,024 bytes, two blocks of width 64",
        tuple(Job(layer, f"{TEXT}:{layer},small", {}) for layer in REGISTRY),
        {
            "heldout_bits_per_byte": "bits per byte",
            "parameters": "parameters",
            "tokens_per_cpu_second": "tokens/s over LRU's",
        },
        "heldout_bits_per_byte",
        lower=True,
        relative={"tokens_per_cpu_second": "lru"},
    ),
}
