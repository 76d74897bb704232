"""One label per sequence: ListOps, images pixel by pixel, source code by package, time series.

    python -m experiments.train --config=experiments/configs/classify.py:digits,s5
    python -m experiments.train --config=experiments/configs/classify.py:time_series,lru \
        --config.task.path=ACSF1
    python -m experiments.train --config=experiments/configs/classify.py:images,lru \
        --config.task.tfds=mnist

The words are a task and a layer. The tasks:

- `digits`: the 8 x 8 images of scikit-learn (pip install -e '.[tasks]').
- `images`: a prepared image set of TensorFlow Datasets: mnist, fashion_mnist, cifar10, ... Permuted
  MNIST is `--config.task.permuted=True`.
- `listops`: ListOps of the Long Range Arena (arXiv 2011.04006).
- `pathfinder`: two marked ends of dashed curves, connected or not, in generated images of 32 x 32
  (arXiv 1805.08315; smaller than in the Long Range Arena in curves and data).
- `packages`: the package of Python's standard library that a window of 512 bytes is from.
- `time_series`: a folder of `.ts` files, such as EigenWorms, or the name of a data set of aeon.

Hardware: any; a run takes minutes on two CPU cores. To keep it short, ListOps has 50 to 200 tokens.
`full` uses the Arena's 500 to 2,000 tokens and 96,000 expressions, for an accelerator; it has not
been run. `quicktest` is a run of seconds. S5 is bidirectional, as in its paper.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import common

TASKS = ("digits", "images", "listops", "packages", "pathfinder", "time_series")
KINDS = {"task": TASKS, "layer": common.layers("s5")}
SWITCHES = {
    "full": "the sizes of the Long Range Arena (listops only); not run yet"
} | common.QUICKTEST


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a task, a layer and switches."""
    words, switches = common.parse(arg, KINDS, SWITCHES)
    task, layer, full = words["task"], words["layer"], "full" in switches
    name = "-".join([task, layer, *sorted(switches)])
    config = ConfigDict(common.settings(name, layer, dim=64, depth=2, heads=4))
    config.model.options.s5.update({"dt_min": 1e-3, "dt_max": 1e-1, "bidirectional": True})
    every: dict[str, dict[str, Any]] = {
        "digits": {},
        "images": {"tfds": "", "tfds_dir": "", "permuted": False},
        "listops": {"train_size": 10_000, "test_size": 1_000, "shortest": 50, "longest": 200},
        "packages": {"longest": 512, "classes": 6},
        "pathfinder": {"train_size": 10_000, "test_size": 1_000, "size": 32, "distractors": 4},
        "time_series": {"path": ""},
    }
    sizes = every[task]
    if full and task == "listops":
        sizes = {"train_size": 96_000, "test_size": 2_000, "shortest": 500, "longest": 2_000}
    steps = {"digits": 1_500, "packages": 1_000, "time_series": 500}.get(task, 2_000)
    config.update(
        {
            "steps": steps,
            "log_every": 50,
            "eval_every": steps // 5,
            "save_every": steps // 5,
            "task": {"name": task, "seed": 1000, "pool": "mean"} | sizes,
            "data": {"batch_size": 32, "length": 0},
            "eval": {"quick": 256},
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.05},
        }
    )
    if "quicktest" in switches:
        config.update(common.small(layer))
        config.update({"data": {"batch_size": 4, "length": 16}, "eval": {"quick": 8}})
        if task == "listops":
            config.task.update({"train_size": 64, "test_size": 16, "shortest": 3, "longest": 20})
        if task == "pathfinder":
            config.task.update({"train_size": 16, "test_size": 8})
        if task == "packages":
            config.task.update({"longest": 16, "classes": 2})
    return config
