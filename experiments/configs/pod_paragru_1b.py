"""A ParaGRU of 1.3 billion parameters, for a TPU pod.

    python -m experiments.train --config=experiments/configs/pod_paragru_1b.py:8k --distributed

Hardware: a TPU slice; experiments/README.md has what `experiments.plan` says of v5e:16x16,
v5p:4x4x4 and v6e:16x16. `:131k` splits windows of 131,072 bytes over 8 chips each. Never trained
by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import pods

KINDS = pods.KINDS


def get_config(arg: str = "") -> ConfigDict:
    """Builds the configuration; `arg` is 8k or 131k."""
    return pods.recipe(
        "paragru-1.3b",
        "paragru",
        arg,
        {"dim": 2048, "depth": 26, "mlp_ratio": 8 / 3},
        {"state_dim": 2048},
    )
