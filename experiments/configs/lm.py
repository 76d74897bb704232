"""Byte-level language models on text, one for each layer type.

    python -m experiments.train --config=experiments/configs/lm.py:gated_deltanet

Hardware: any. The defaults are for two CPU cores: 500 steps of 16 x 128 bytes, two blocks of width
128, about 0.4 million parameters. Results on the first 524,288 held-out bytes of the Python 3.11
standard library: deltanet 2.05 bits per byte, gated_deltanet 1.92 (gzip 2.01, xz 1.63). A deltanet
run takes about three minutes of CPU time. LRU and S5 take less than half the time of
gated_deltanet, Mamba about twice; expect 1.8 to 2.1 bits per byte. The nonlinear RNNs (elman to
ltc) have not been measured with these sizes; experiments/results/RESULTS.md has them at 463,000
parameters. `summary.json` contains the result of a run.

`:deltanet,small` (any layer) is a run of about a minute: 200 steps of 8 x 128 bytes, blocks of
width 64, no sample. The grid `layers` of `experiments.sweep` trains every layer at this size.

`:deltanet,quicktest` (any layer) is a run of a few seconds that learns almost nothing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import common

KINDS = {"layer": common.layers("deltanet")}
SWITCHES = {"small": "width 64, 200 steps of 8 x 128 bytes"} | common.QUICKTEST
# 48 samples of 500 bytes from `lm.py:deltanet` have 31 % white space and 2.08 bits per byte, close
# to 32 % and 2.05 of the held-out text. Temperature 0.8 and top_p 0.95 give 47 % and 1.10 bits per
# byte (24 samples).
TEMPERATURE = 1.0
TOP_P = 0.99


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` is a layer name and switches, separated by commas."""
    words, switches = common.parse(arg, KINDS, SWITCHES)
    layer = words["layer"]
    dim = 64 if "small" in switches else 128
    config = ConfigDict(common.settings(f"lm-{layer}", layer, dim=dim, depth=2, heads=dim // 16))
    config.update(
        {
            "data": {
                "path": "",
                "tfds": "",
                "tfds_dir": "",
                "tfds_train": "train",
                "tfds_heldout": "test",
                "tfds_text": "text",
                "tfds_heldout_documents": 10_000,
                "heldout_fraction": 0.1,
                "length": 128,
                "batch_size": 16,
                "shuffle_windows": 16384,
                "streams": 1,
            },
            "eval": {
                "lanes": 32,
                "bytes": 1 << 16,
                "final_bytes": 1 << 19,
                "times": 1,
                # Stuffed Mamba (arXiv 2410.07145) changes trained models for longer sequences.
                "options": {"mamba2": {"write_factor": 1.0, "decay_factor": 1.0}},
            },
            "sample": {
                "prompt": "",
                "num_bytes": 400,
                "temperature": TEMPERATURE,
                "top_p": TOP_P,
            },
        }
    )
    if "small" in switches:
        config.name += "-small"
        config.update(
            {
                "steps": 200,
                "data": {"batch_size": 8},
                "eval": {"bytes": 1 << 14, "final_bytes": 1 << 16},
                "sample": {"num_bytes": 0},  # no sample
            }
        )
    if "quicktest" in switches:
        config.name += "-quicktest"
        config.update(common.small(layer))
        config.update(
            {
                "data": {"length": 32, "batch_size": 4, "shuffle_windows": 64},
                "eval": {"lanes": 4, "bytes": 512, "final_bytes": 2048},
                "sample": {"num_bytes": 40},
            }
        )
    return config
