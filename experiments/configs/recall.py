"""Recall: MQAR, copying, induction, retrieval from long texts, and in-context learning.

    python -m experiments.train --config=experiments/configs/recall.py:mqar,deltanet

The words are a task and a layer. Sizes are smaller than in the papers:

- `mqar` (arXiv 2312.04927): 32 tokens, 4 pairs, 64 symbols (paper: 512, 64 and 8,192).
- `selective_copying` (arXiv 2312.00752): 8 tokens among 64 positions (paper: 16 among 4,096).
- `induction_heads` (same paper): train on 64 tokens, test on up to 4,096 (paper: 256 and 2^20).
- `passkey` (arXiv 2305.16300): 5 digits in a repeated text of 64 tokens, tested on up to 4,096.
- `needles` (arXiv 2404.06654): one of 4 keys with 3 digits each, in a random text of 64 to 4,096.
- `match_to_sample`: compare two items, 30 distractors apart, tested with up to 510.
- `languages` (arXiv 2401.12973): words of an automaton that changes with each sequence.
- `linear_functions` (arXiv 2208.01066): regression on 8 features (paper: 20), with the error
  relative to the mean square of the targets as its metric.

Hardware: any; a run takes minutes on two CPU cores. `full` uses the sizes of the papers for the
first three tasks, for an accelerator; it has not been run. Training takes many small batches: on
MQAR, Mamba of width 64 outputs one of the four values at random for over 1,000 steps before it
learns the keys. A run stops once 99 % of the answers to 128 test sequences are right. `quicktest`
is a run of seconds.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import common

TASKS = (
    "mqar",
    "selective_copying",
    "induction_heads",
    "passkey",
    "needles",
    "match_to_sample",
    "languages",
    "linear_functions",
)
KINDS = {"task": TASKS, "layer": common.layers("deltanet")}
SWITCHES = {"full": "the sizes of the papers; not run yet"} | common.QUICKTEST
LONGER = (64, 256, 1024, 4096)


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` contains a task, a layer and switches."""
    words, switches = common.parse(arg, KINDS, SWITCHES)
    task, layer, full = words["task"], words["layer"], "full" in switches
    name = "-".join([task, layer, *sorted(switches)])
    config = ConfigDict(common.settings(name, layer, dim=64, depth=2, heads=4))
    every: dict[str, dict[str, Any]] = {
        "mqar": {"train_length": 32, "pairs": 4, "vocab_size": 64},
        "selective_copying": {"train_length": 64, "vocab_size": 16, "data_tokens": 8},
        "induction_heads": {
            "train_length": 64,
            "test_lengths": LONGER,
            "vocab_size": 16,
        },
        "passkey": {"train_length": 64, "test_lengths": LONGER, "needles": 1, "digits": 5},
        "needles": {"train_length": 64, "test_lengths": LONGER, "needles": 4, "digits": 3},
        "match_to_sample": {"train_length": 32, "test_lengths": (32, 128, 512), "vocab_size": 24},
        "languages": {"train_length": 256, "test_lengths": (256, 512), "symbols": 18},
        "linear_functions": {"train_length": 17, "features": 8},
    }
    sizes = every[task]
    if full:
        larger: dict[str, dict[str, Any]] = {
            "mqar": {"train_length": 512, "pairs": 64, "vocab_size": 8192},
            "selective_copying": {"train_length": 4096, "data_tokens": 16},
            "induction_heads": {
                "train_length": 256,
                "test_lengths": tuple(2**i for i in range(6, 21, 2)),
            },
        }
        sizes |= larger.get(task, {})
    steps = 100_000 if full else 4_000
    config.update(
        {
            "steps": steps,
            # Stop when the task is learned, as zoology does.
            "stop_at": 0.0 if full or task == "linear_functions" else 0.99,
            "log_every": 100,
            "eval_every": steps // 10,
            "save_every": steps // 5,
            # JRT-prompt (arXiv 2407.05483): each sequence twice in a row, answered the second time.
            "task": {"name": task, "seed": 1000, "read_twice": False} | sizes,
            "data": {"batch_size": 64 if full else 32, "packed_length": 0},
            "eval": {"sequences": 512, "quick": 128, "tokens": 1 << 15},
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "recurrence_rate": 1.0},
        }
    )
    if "quicktest" in switches:
        config.update(common.small(layer))
        config.update({"data": {"batch_size": 4}, "eval": {"sequences": 8, "quick": 4}})
        config.task.update(
            {
                "mqar": {"train_length": 16, "pairs": 2, "vocab_size": 16},
                "selective_copying": {"train_length": 12, "data_tokens": 3},
                "induction_heads": {"train_length": 12, "test_lengths": (12,)},
                "passkey": {"train_length": 16, "test_lengths": (16,)},
                "needles": {"train_length": 24, "test_lengths": (24,)},
                "match_to_sample": {"train_length": 6, "test_lengths": (8,)},
                "languages": {"train_length": 16, "test_lengths": (16,)},
                "linear_functions": {"train_length": 9, "features": 3},
            }[task]
        )
    return config
