"""State tracking: regular languages, modular arithmetic, word problems of permutation groups.

    python -m experiments.train --config=experiments/configs/state_tracking.py:parity,deltanet

The words are a task, a layer, and `negative`. The tasks (`experiments.tasks.automata` defines all
but modular arithmetic):

- `parity`, `sum`, `cycle_navigation`: moves on a cycle of 2, 5 and 5 positions.
- `even_pairs`: whether the first bit equals the last.
- `modular_arithmetic`: sums and products modulo 5.
- `S3`, `S4`, `A5`, `S5`: products of permutations.
- `flip_flop`: a bit that one symbol in ten writes.
- `star_free`, `dyck`: brackets of one kind, 4 deep, and of two kinds, 8 deep.

`negative` gives DeltaNet, gated DeltaNet and Mamba eigenvalues in [-1, 1] instead of [0, 1]. On
parity this raises the accuracy from 0 to 100 % above chance (arXiv 2411.12537). Models train on 3
to 40 symbols and are tested on up to 256.

Hardware: any; a run takes minutes on two CPU cores. For that, it differs from the paper: every
symbol has an answer, not only the last one; two blocks have width 64; and training takes 1,500
batches of 64. A run stops early if all answers to 128 of the longest test sequences are right.
`full` counts the last answer only and uses width 128 and 100,000 batches of 1,024, for an
accelerator; it has not been run. `quicktest` is a run of seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.tasks import state_tracking

TASKS = state_tracking.NAMES
KINDS = {"task": TASKS, "layer": common.layers("deltanet")}
SWITCHES = {
    "negative": "eigenvalues in [-1, 1] for DeltaNet and Mamba",
    "full": "the sizes of the paper; not run yet",
} | common.QUICKTEST


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a task, a layer and switches."""
    words, switches = common.parse(arg, KINDS, SWITCHES)
    task, layer, full = words["task"], words["layer"], "full" in switches
    name = "-".join([task, layer, *sorted(switches)])
    config = ConfigDict(common.settings(name, layer, dim=128 if full else 64, depth=2, heads=4))
    steps = 100_000 if full else 1_500
    config.update(
        {
            "steps": steps,
            "stop_at": 0.0 if full else 0.9999,
            "log_every": 100,
            "eval_every": steps // 10,
            "save_every": steps // 5,
            "task": {
                "name": task,
                "seed": 1000,
                "train_length": 39 if task == "modular_arithmetic" else 40,
                "test_lengths": (39, 65, 129, 255)
                if task == "modular_arithmetic"
                else (40, 64, 128, 256),
                "last_only": full,
                # Rows over which the length of sequences grows; see `experiments.tasks.examples`.
                "curriculum": 0,
            },
            "data": {"batch_size": 1024 if full else 64, "packed_length": 0},
            "eval": {"sequences": 512, "quick": 128, "tokens": 1 << 15},
            # Recurrence parameters use the full learning rate. With a quarter of it, a GRU has not
            # learned parity after 3,000 steps; with all of it, it has after 500.
            "optimizer": {
                "learning_rate": 3e-3,
                "weight_decay": 0.01,
                "recurrence_rate": 1.0,
            },
        }
    )
    if "negative" in switches:
        for name in ("deltanet", "gated_deltanet", "mamba"):
            config.model.options[name].negative_eigenvalues = True
    if "quicktest" in switches:
        config.update(common.small(layer))
        config.update(
            {
                "task": {"train_length": 7, "test_lengths": (9,)},
                "data": {"batch_size": 4},
                "eval": {"sequences": 8, "quick": 4},
            }
        )
    return config
