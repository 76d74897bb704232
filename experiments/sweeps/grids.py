"""Grids of runs that hold the library against papers; `experiments.sweep` runs them.

Sizes are such that all of them can be run again in some hours on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

STATE = "experiments/configs/state_tracking.py"
RECALL = "experiments/configs/recall.py"
CLASSIFY = "experiments/configs/classify.py"
TEXT = "experiments/configs/lm.py"


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
      label: what is compared in the table; jobs that differ by seed or learning rate share it.
      config: FILE:WORDS.
      overrides: fields of the configuration, with dots, and their values.
    """

    label: str
    config: str
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Jobs, and the table of their results.

    Attributes:
      title: of the table.
      jobs: what to run, for every seed.
      columns: numbers of a run's summary and what they are called in the table.
      metric: the number by which a learning rate is chosen; larger is better unless `lower`.
      published: what papers report, by label.
      source: where they do.
      lower: whether smaller is better.
      note: what is to be said of the results, below the table.
      figure: the override that is the horizontal axis of a figure, or "curve" for the metric over
        tokens and over seconds, if there is a figure.
    """

    title: str
    jobs: tuple[Job, ...]
    columns: dict[str, str]
    metric: str
    published: dict[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""
    lower: bool = False
    note: str = ""
    figure: str = ""


def _state(task: str, layers: tuple[str, ...], longer: tuple[str, ...] = ()) -> Grid:
    """A grid of state tracking; layers named in `longer` take 6,000 steps."""
    jobs = tuple(
        Job(
            words.replace(",negative", ", [-1, 1]"),
            f"{STATE}:{task},{words}",
            {RATE: 3e-3} | ({"steps": 6000} if words in longer else {}),
        )
        for words in layers
    )
    lengths = (39, 65, 129, 255) if task == "modular_arithmetic" else (40, 64, 128, 256)
    columns = {f"accuracy_{n}": f"T = {n}" for n in lengths}
    columns["scaled_accuracy"] = f"T = {lengths[-1]}, scaled"
    title = f"State tracking: {task.replace('_', ' ')}, trained on up to {lengths[0]} symbols"
    published, source = PUBLISHED.get(task, ({}, ""))
    metric = f"accuracy_{lengths[-1]}"
    return Grid(title, jobs, columns, metric, published, source, note=NOTES.get(task, ""))


def _each(file: str, task: str, layers: tuple[str, ...]) -> tuple[Job, ...]:
    """The task with every layer, as its configuration has it."""
    return tuple(Job(layer, f"{file}:{task},{layer}", {}) for layer in layers)


RATE = "optimizer.learning_rate"
EIGENVALUES = ("deltanet", "deltanet,negative", "mamba", "mamba,negative")
NONLINEAR = ("gru", "lstm", "paragru", "paralstm")
PUBLISHED = {
    "parity": (
        {"mamba": "0", "mamba, [-1, 1]": "1.0", "deltanet": "0.017", "deltanet, [-1, 1]": "1.0"},
        "arXiv 2411.12537, at up to 256 symbols, scaled: chance is 0",
    ),
    "modular_arithmetic": (
        {"gru": "100 %", "lstm": "100 %", "paragru": "63 %", "paralstm": "94 %"},
        "arXiv 2510.21450, table 1, one layer (two here)",
    ),
    "A5": (
        {"gru": "100 %", "lstm": "100 %", "paragru": "40 %", "paralstm": "38 %"},
        "arXiv 2510.21450, table 1, one layer (two here)",
    ),
}
NOTES = {
    "mqar": (
        "As in the paper (arXiv 2312.04927, whose sizes are larger) attention recalls at every "
        "width, and Mamba, the other layer that it has as well, needs a larger one and one of the "
        "two learning rates. Gated DeltaNet, whose states are matrices, is right from a smaller "
        "width on; LRU and S5, whose decays do not depend on the input, and GateLoop, which sees "
        "no two neighbours at once, are at none of these. Who stands at a quarter says one of the "
        "four values that are there, but not the key's own."
    ),
    "parity": (
        "As in the paper, eigenvalues of both signs are what makes the difference. An answer is "
        "asked for after every symbol, not after the last one only, and whoever counts up to forty "
        "is right on the first forty of them: so the others stand above 0. The elementwise cells "
        "ParaGRU and ParaLSTM had not learned the task after these 1,500 steps; GRU and LSTM had."
    ),
    "modular_arithmetic": (
        "The RNNs took 6,000 steps and the others 1,500, and nobody is at the paper's figures: at "
        "the length of the training the RNNs are right seven to nine times in ten, and their loss "
        "was falling still; beyond it they lose the thread. Mamba with eigenvalues of both signs "
        "is ahead of Mamba without after as many steps. Tried besides: a GRU of twice the width "
        "was no faster, and a learning rate of 0.01 slower."
    ),
    "S3": (
        "A GRU learns it in 6,000 steps, to the end of sequences six times as long as those it was "
        "trained on. After the others' 1,500 steps nobody has; DeltaNet with eigenvalues of both "
        "signs is ahead of DeltaNet without then, and Mamba with them of both."
    ),
    "selective_copying": (
        "As in the paper, what to keep has to depend on the input: Mamba and gated DeltaNet are at "
        "99 % after 1,600 steps, LRU and S5 are not after 4,000. Among so few positions they get "
        "further than S4 among 4,096."
    ),
    "induction_heads": (
        "All are right at the length of the training. Gated DeltaNet is at 64 times that, too; "
        "Mamba, which the paper trains on 256 tokens for many more steps, is not after these."
    ),
    "listops": (
        "Far from the papers' figures, on shorter expressions: 2,000 steps of 32 are about six "
        "passes over 10,000 of them, a tenth of what the papers have."
    ),
    "text": (
        "One learning rate for all, and one seed: small differences say nothing. Seconds are of "
        "one core with another run on the other."
    ),
    "S5": "As A5: not learned in 1,500 steps by DeltaNet or GRU.",
    "A5": (
        "Nobody has learned this after 1,500 steps at this learning rate, GRU and LSTM included, "
        "which the paper trains to 100 %: too few steps to say who could. Longer runs: "
        "`--set=steps=...`."
    ),
}
MIXERS = ("lru", "s5", "gateloop", "mamba", "gated_deltanet", "attention")
# What gives models of text the 463,000 parameters of Mamba's, within a percent, of whatever layer.
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
LINEAR = ("lru", "s5", "mamba", "gated_deltanet")
BESIDE_MAJORITY = {"accuracy": "accuracy", "majority": "majority"}

GRIDS: dict[str, Grid] = {
    "parity": _state("parity", (*EIGENVALUES, *NONLINEAR)),
    "modular_arithmetic": _state(
        "modular_arithmetic", (*EIGENVALUES[1:], *NONLINEAR), longer=NONLINEAR
    ),
    "S3": _state("S3", ("deltanet", "deltanet,negative", "mamba,negative", "gru"), longer=("gru",)),
    "A5": _state("A5", ("deltanet,negative", *NONLINEAR)),
    "S5": _state("S5", ("deltanet,negative", "gru")),
    "mqar": Grid(
        "MQAR: 32 tokens, 4 pairs, 64 symbols; the better of two learning rates",
        tuple(
            Job(
                f"{layer}, width {dim}",
                f"{RECALL}:mqar,{layer}",
                {"model.dim": dim, RATE: rate},
            )
            for layer, dim, rate in itertools.product(MIXERS, (16, 32, 64), (2e-3, 6e-3))
        ),
        {"accuracy": "accuracy"},
        "accuracy",
        note=NOTES["mqar"],
        figure="model.dim",
    ),
    "selective_copying": Grid(
        "Selective copying: 8 tokens among 64 positions",
        _each(RECALL, "selective_copying", LINEAR),
        {"accuracy": "accuracy"},
        "accuracy",
        {"mamba": "99.8 %", "s5": "18.3 % (S4)"},
        "arXiv 2312.00752, 4,096 positions",
        note=NOTES["selective_copying"],
    ),
    "induction_heads": Grid(
        "Induction heads, trained on 64 tokens",
        _each(RECALL, "induction_heads", LINEAR),
        {f"accuracy_{n}": f"T = {n:,}" for n in (64, 256, 1024, 4096)},
        "accuracy_4096",
        {"mamba": "100 %"},
        "arXiv 2312.00752, trained on 256 and tested on up to 2^20 tokens",
        note=NOTES["induction_heads"],
    ),
    "listops": Grid(
        "ListOps, expressions of 50 to 200 tokens",
        _each(CLASSIFY, "listops", ("lru", "s5")),
        BESIDE_MAJORITY,
        "accuracy",
        {"lru": "60.2 %", "s5": "62.2 %"},
        "arXiv 2303.06349 and 2208.04933, expressions of 500 to 2,000 tokens",
        note=NOTES["listops"],
    ),
    "packages": Grid(
        "From which of six packages are these 512 bytes",
        _each(CLASSIFY, "packages", ("lru", "s5")),
        BESIDE_MAJORITY,
        "accuracy",
    ),
    "digits": Grid(
        "Digits, 8 x 8 pixels one after the other",
        _each(CLASSIFY, "digits", ("lru", "s5", "gru")),
        BESIDE_MAJORITY,
        "accuracy",
    ),
    "time_series": Grid(
        "Time series that come with aeon",
        tuple(
            Job(f"{layer}, {name}", f"{CLASSIFY}:time_series,{layer}", {"task.path": name})
            for name, layer in itertools.product(
                ("BasicMotions", "JapaneseVowels", "OSULeaf"), ("lru", "s5")
            )
        ),
        BESIDE_MAJORITY,
        "accuracy",
    ),
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
        note=NOTES["text"],
        figure="curve",
    ),
}
