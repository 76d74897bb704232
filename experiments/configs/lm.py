"""Byte-level language models on text, one for each layer.

    python -m experiments.train --config=experiments/configs/lm.py:deltanet

Hardware: any; the defaults are for two CPU cores: 500 steps of 16 x 128 bytes with two blocks of
width 128, about 0.4 million parameters. Time and result, on two cores: deltanet took a little over
two minutes, installation included, and ended at 1.92 held-out bits per byte on 524,288 bytes of the
Python 3.11 standard library (gzip 2.01, xz 1.63). LRU and S5 take less than half of its time, Mamba
about twice; expect 1.8 to 2.1 from each of these. The nonlinear RNNs (elman to ltc) have not been
measured. `summary.json` holds what a run reached.

`:deltanet,quicktest` (any layer) is a run of a few seconds that learns next to nothing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import common

KINDS = {"layer": common.layers("deltanet")}


def get_config(arg: str = "") -> ConfigDict:
    """Builds the configuration; `arg` is a layer name, `quicktest`, or both with a comma."""
    words, switches = common.parse(arg, KINDS)
    layer = words["layer"]
    config = ConfigDict(common.settings(f"lm-{layer}", layer, dim=128, depth=2, heads=8))
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
            "eval": {"lanes": 32, "bytes": 1 << 16, "final_bytes": 1 << 19},
            "sample": {"prompt": "", "num_bytes": 400, "temperature": 0.8, "top_p": 0.95},
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
