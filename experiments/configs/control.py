"""Reinforcement learning with memory: PPO on games of cards, after POPGym (arXiv 2303.01859).

    python -m experiments.train --config=experiments/configs/control.py:repeat_previous,gru

The words are a game and a layer. The games:

- `repeat_previous`: name the suit shown three steps ago, in a deck of 52 cards (POPGym's easy one).
- `autoencode`: watch 12 cards, then name their suits in reverse order (POPGym: 52 cards).

A return is 1 if all answers are right and -1 if all are wrong; random answers give -0.5. `step` is
an iteration: 64 games play 64 steps each, then four passes over these steps update the model.

Hardware: any; a run takes minutes on two CPU cores. `quicktest` is a run of seconds.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import common

GAMES = ("repeat_previous", "autoencode")
KINDS = {"game": GAMES, "layer": common.layers("gru")}
SWITCHES = common.QUICKTEST


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a game, a layer and switches."""
    words, switches = common.parse(arg, KINDS, SWITCHES)
    game, layer = words["game"], words["layer"]
    config = ConfigDict(
        common.settings("-".join([game, layer, *sorted(switches)]), layer, dim=64, depth=2, heads=4)
    )
    for unused in ("mesh", "mesh_axis_types", "stop_at", "eval_every", "save_every", "keep"):
        del config[unused]
    sizes: dict[str, dict[str, Any]] = {
        "repeat_previous": {"cards": 52, "lag": 3},
        "autoencode": {"cards": 12},
    }
    config.update(
        {
            "steps": 150,
            "log_every": 10,
            "game": {"name": game} | sizes[game],
            "control": {
                "envs": 64,
                "rollout": 64,
                "epochs": 4,
                "minibatches": 4,
                "discount": 0.99,
                "trace": 0.95,
                "clip": 0.2,
                "entropy": 0.01,
                "value": 0.5,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "weight_decay": 0.0,
                "clip_norm": 0.5,
                "recurrence_rate": 1.0,
            },
        }
    )
    if "quicktest" in switches:
        small = common.small(layer)
        config.update({"steps": 2, "log_every": 1, "model": small["model"]})
        config.control.update({"envs": 4, "rollout": 8, "epochs": 2, "minibatches": 2})
        config.game.cards = 8
    return config
