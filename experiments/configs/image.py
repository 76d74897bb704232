"""One label per image, by layers over grids or by layers that read the pixels row after row.

    python -m experiments.train --config=experiments/configs/image.py:arrows,plstm_2d
    python -m experiments.train --config=experiments/configs/image.py:image_digits,chimera

The words are a task and a layer. The tasks:

- `arrows`: arrow pointing of pLSTM (arXiv 2506.11997), a small form: does the arrow point to the
  circle? Trained on images of 8 x 8 pixels, tested on up to 16 x 16.
- `image_digits`: the 8 x 8 images of scikit-learn (pip install -e '.[tasks]').

The layers are `plstm_2d` (both modes alternate), `chimera`, and all layers over sequences.

Hardware: one device; a run takes minutes on two CPU cores. `quicktest` is a run of seconds. S5 is
bidirectional, as in its paper.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import common
from seqjax.layers import GRID_REGISTRY

TASKS = ("arrows", "image_digits")
MIXERS = {"plstm_2d": "plstm_2d_p,plstm_2d_d", "chimera": "chimera"}
KINDS = {"task": TASKS, "layer": tuple(dict.fromkeys([*MIXERS, *common.MIXERS]))}


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a task, a layer and switches."""
    words, switches = common.parse(arg, KINDS, common.QUICKTEST)
    task, layer, quick = words["task"], words["layer"], "quicktest" in switches
    dim, heads = 16, 2
    # Words of grids are unknown to the shared settings.
    known = layer if layer in common.MIXERS else "lru"
    name = "-".join([task, layer, *sorted(switches)])
    config = ConfigDict(common.settings(name, known, dim=dim, depth=2, heads=heads))
    steps = 10 if quick else {"arrows": 4_000, "image_digits": 1_500}[task]
    config.update(
        {
            "steps": steps,
            "log_every": 50,
            "eval_every": steps // 5,
            "save_every": steps // 5,
            "task": {"name": task, "seed": 1000, "pool": "mean"},
            "data": {"batch_size": 32},
            "eval": {"quick": 256},
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.05},
        }
    )
    if task == "arrows":
        sizes = {"train_size": 20_000, "test_size": 1_000, "side": 8, "test_sides": (8, 12, 16)}
        config.task.update(sizes | {"pool": "max"})
    if quick:
        config.update(common.small(known))
        config.update({"data": {"batch_size": 4}, "eval": {"quick": 8}})
        if task == "arrows":
            config.task.update({"train_size": 64, "test_size": 16, "test_sides": (4, 6)})
            config.task.side = 4
    config.model.mixers = MIXERS.get(layer, common.MIXERS.get(layer, layer))
    config.model.depth = max(2, len(config.model.mixers.split(",")))
    config.model.options.s5.update({"dt_min": 1e-3, "dt_max": 1e-1, "bidirectional": True})
    options = {name: entry.defaults(dim, heads) for name, entry in GRID_REGISTRY.items()}
    config.model.options.update(options)
    return config
