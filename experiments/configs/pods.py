"""What the recipes for TPU pods share; each `pod_*.py` says what its model is."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.base.errors import UserError, nearest
from experiments.configs import lm

RECIPES = ("pod_gated_deltanet_1b", "pod_mamba_1b", "pod_paragru_1b", "pod_gated_deltanet_7b")
# Window length -> (sequences a step, mesh). Two million bytes a step at 8k, four at 131k.
LENGTHS = {
    "8k": (8192, 256, "fsdp=-1"),
    "131k": (131072, 32, "fsdp=-1,sequence=8"),
}
KINDS = {"length": tuple(LENGTHS)}


def recipe(name: str, mixer: str, arg: str, model: dict[str, Any], options: Any) -> ConfigDict:
    """A configuration for a pod: bfloat16, stacked blocks computed again, and a long window.

    Args:
      name: of the recipe.
      mixer: a key of `common.MIXERS`.
      arg: a key of LENGTHS; empty for 8k.
      model: what differs in `config.model`.
      options: the mixer's own options.
    """
    arg = arg or "8k"
    if arg not in LENGTHS:
        raise UserError(f"unknown length {arg!r}: {nearest(arg, LENGTHS)}")
    length, batch_size, mesh = LENGTHS[arg]
    config = lm.get_config(mixer)
    config.update(
        {
            "name": f"pod-{name}-{arg}",
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
    config.model.options[mixer].update(options)
    return config
