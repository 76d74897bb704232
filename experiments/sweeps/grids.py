"""Grids of runs for comparison with published results; `experiments.sweep` runs them.

All grids together take some hours on two CPU cores.
"""

from __future__ import annotations

import itertools

from experiments.sweeps import language
from experiments.sweeps.jobs import RATE, Grid, Job, each

STATE = "experiments/configs/state_tracking.py"
RECALL = "experiments/configs/recall.py"
CLASSIFY = "experiments/configs/classify.py"
IMAGE = "experiments/configs/image.py"
CONTROL = "experiments/configs/control.py"


def _layer(words: str) -> str:
    """Return the words for a layer of state tracking as they are in tables."""
    return words.replace(",negative", ", [-1, 1]")


def _state(
    task: str,
    layers: tuple[str, ...],
    longer: tuple[str, ...] = (),
    taught: tuple[str, ...] = (),
) -> Grid:
    """Return a grid of state tracking.

    Layers in `longer` train for 6,000 steps, those in `taught` with a curriculum.
    """
    jobs = tuple(
        Job(
            _layer(words),
            f"{STATE}:{task},{words}",
            {RATE: 3e-3} | ({"steps": 6000} if words in longer else {}),
        )
        for words in layers
    )
    jobs += tuple(
        Job(
            f"{layer}, curriculum",
            f"{STATE}:{task},{layer}",
            TAUGHT | ({f"model.options.{layer}.state_dim": 128} if layer in NONLINEAR else {}),
        )
        for layer in taught
    )
    lengths = (39, 65, 129, 255) if task == "modular_arithmetic" else (40, 64, 128, 256)
    columns = {f"accuracy_{n}": f"T = {n}" for n in lengths}
    columns["scaled_accuracy"] = f"T = {lengths[-1]}, scaled"
    title = f"State tracking: {task.replace('_', ' ')}, trained on up to {lengths[0]} symbols"
    published, source = PUBLISHED.get(task, ({}, ""))
    metric = f"accuracy_{lengths[-1]}"
    # Expressions have an answer at every other symbol.
    answers = 128 if task == "modular_arithmetic" else 256
    return Grid(title, jobs, columns, metric, published, source, answers=answers)


def _with_curriculum(published: dict[str, str]) -> dict[str, str]:
    """Return published results by layer, also for the row of the layer with a curriculum."""
    return published | {f"{layer}, curriculum": result for layer, result in published.items()}


# A mixer alone, with large batches: 12,800 symbols. Sequences of 3 symbols fill the first 700
# steps, which a GRU needs for the products of three elements of A5.
TAUGHT = {
    RATE: 3e-3,
    "model.depth": 1,
    "model.dim": 128,
    "model.mlp_ratio": 0.0,
    "data.batch_size": 320,
    "steps": 8000,
    "task.curriculum": 2_000_000,
    "eval_every": 500,
    "save_every": 500,
}
# A mixer alone. Sequences grow from 3 to 16 symbols over 390 of 2,000 steps of 256 rows.
PRODUCT = {
    RATE: 3e-3,
    "model.depth": 1,
    "model.mlp_ratio": 0.0,
    "data.batch_size": 256,
    "task.train_length": 16,
    "task.curriculum": 100_000,
    "steps": 2000,
    "eval_every": 500,
    "save_every": 500,
}
SHORT = {
    RATE: 3e-3,
    "model.depth": 1,
    "model.options.gru.state_dim": 128,
    "task.train_length": 16,
    "eval_every": 500,
    "save_every": 1500,
    "eval.sequences": 128,
}
# At least one layer of each family of recurrences.
FAMILIES = (
    "lru",
    "mingru",
    "mamba,negative",
    "block_linear",
    "gla",
    "mlstm",
    "deltanet,negative",
    "gated_deltanet,negative",
    "deltaproduct",
    "kda",
    "comba",
    "rwkv7",
    "gru",
    "lstm",
    "slstm",
    "attention",
)
EIGENVALUES = ("deltanet", "deltanet,negative", "mamba", "mamba,negative")
NONLINEAR = ("gru", "lstm", "paragru", "paralstm")
ONE_LAYER = "arXiv 2510.21450, table 1, one layer (here two, and one with a curriculum)"
PUBLISHED = {
    "parity": (
        {"mamba": "0", "mamba, [-1, 1]": "1.0", "deltanet": "0.017", "deltanet, [-1, 1]": "1.0"},
        "arXiv 2411.12537, at up to 256 symbols, scaled: chance is 0",
    ),
    "modular_arithmetic": (
        _with_curriculum({"gru": "100 %", "lstm": "100 %", "paragru": "63 %", "paralstm": "94 %"}),
        ONE_LAYER,
    ),
    "A5": (
        _with_curriculum({"gru": "100 %", "lstm": "100 %", "paragru": "40 %", "paralstm": "38 %"}),
        ONE_LAYER,
    ),
}
MIXERS = ("lru", "s5", "gateloop", "mamba", "gated_deltanet", "attention")
LINEAR = ("lru", "s5", "mamba", "gated_deltanet")
EACH_KIND = ("lru", "mamba", "gated_deltanet", "gru", "attention")
LONGER = {f"accuracy_{n}": f"T = {n:,}" for n in (64, 256, 1024, 4096)}
# S5 reads the pixels row after row, in both directions.
GRIDDED = ("plstm_2d", "s5", "chimera")
BESIDE_MAJORITY = {"accuracy": "accuracy", "majority": "majority"}

GRIDS: dict[str, Grid] = {
    "parity": _state("parity", (*EIGENVALUES, *NONLINEAR)),
    "modular_arithmetic": _state(
        "modular_arithmetic",
        (*EIGENVALUES[1:], *NONLINEAR),
        longer=NONLINEAR,
        taught=NONLINEAR,
    ),
    "S3": _state("S3", ("deltanet", "deltanet,negative", "mamba,negative", "gru"), longer=("gru",)),
    "A5": _state("A5", ("deltanet,negative", *NONLINEAR), taught=NONLINEAR),
    "S5": _state("S5", ("deltanet,negative", "gru"), taught=("gru", "rwkv7")),
    "curriculum": Grid(
        "Curriculum: one block with a GRU, trained on up to 16 symbols",
        tuple(
            Job(
                f"{group}, {'curriculum' if rows else 'mixed lengths'}",
                f"{STATE}:{group},gru",
                SHORT | {"steps": steps, "task.curriculum": rows},
            )
            for group, steps in (("S4", 1500), ("A5", 3000))
            for rows in (2 * steps * 64 // 3, 0)
        ),
        {f"accuracy_{n}": f"T = {n}" for n in (40, 256)},
        "accuracy_256",
        answers=256,
    ),
    "deltaproduct": Grid(
        "State tracking: DeltaProduct with 1 to 4 updates per symbol, with a curriculum",
        tuple(
            Job(
                f"{group}, {updates} updates",
                f"{STATE}:{group},deltaproduct",
                PRODUCT | {"model.options.deltaproduct.updates": updates},
            )
            for group, updates in itertools.product(("S3", "S4", "A5", "S5"), (1, 2, 3, 4))
        ),
        {f"accuracy_{n}": f"T = {n}" for n in (40, 64, 128, 256)},
        "accuracy_128",
        figure="model.options.deltaproduct.updates",
        axis="updates per symbol",
    ),
    "families": Grid(
        "State tracking: layers of all families, trained on up to 16 symbols with a curriculum",
        tuple(
            Job(f"{task}, {_layer(words)}", f"{STATE}:{task},{words}", PRODUCT)
            for words, task in itertools.product(
                FAMILIES, ("parity", "cycle_navigation", "S3", "A5")
            )
        ),
        {f"accuracy_{n}": f"T = {n}" for n in (40, 64, 128, 256)},
        "accuracy_256",
        figure="map",
    ),
    "regular_languages": Grid(
        "State tracking: regular languages, trained on up to 16 symbols with a curriculum",
        tuple(
            Job(f"{task}, {_layer(words)}", f"{STATE}:{task},{words}", PRODUCT | {"steps": 1000})
            for task, words in itertools.product(
                ("sum", "even_pairs", "flip_flop", "star_free", "dyck"),
                ("lru", "mamba,negative", "gated_deltanet,negative", "gru", "attention"),
            )
        ),
        {f"accuracy_{n}": f"T = {n}" for n in (40, 64, 128, 256)},
        "accuracy_256",
    ),
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
        figure="model.dim",
        axis="width",
    ),
    "selective_copying": Grid(
        "Selective copying: 8 tokens among 64 positions",
        each(RECALL, "selective_copying", LINEAR),
        {"accuracy": "accuracy"},
        "accuracy",
        {"mamba": "99.8 %", "s5": "18.3 % (S4)"},
        "arXiv 2312.00752, 4,096 positions",
    ),
    "induction_heads": Grid(
        "Induction heads, trained on 64 tokens",
        each(RECALL, "induction_heads", LINEAR),
        LONGER,
        "accuracy_4096",
        {"mamba": "100 %"},
        "arXiv 2312.00752, trained on 256 and tested on up to 2^20 tokens",
        figure="length",
        axis="length of the test sequences",
    ),
    "passkey": Grid(
        "Passkey: 5 digits in a repeated text, trained on 64 tokens",
        each(RECALL, "passkey", EACH_KIND),
        LONGER,
        "accuracy_4096",
    ),
    "needles": Grid(
        "Needles: one of 4 keys with 3 digits each in a random text, trained on 64 tokens",
        each(RECALL, "needles", EACH_KIND),
        LONGER,
        "accuracy_4096",
    ),
    "match_to_sample": Grid(
        "Match to sample: compare the first token with the last, trained on 32 tokens",
        each(RECALL, "match_to_sample", EACH_KIND),
        {f"accuracy_{n}": f"T = {n}" for n in (32, 128, 512)},
        "accuracy_512",
    ),
    "linear_functions": Grid(
        "Linear functions: regression on 8 features, from 16 examples in the sequence",
        each(RECALL, "linear_functions", EACH_KIND),
        {
            f"{name}_{n}": f"{title}{n} examples"
            for n in (4, 8, 16)
            for name, title in (("error", ""), ("least_squares", "least squares, "))
        },
        "error_16",
        lower=True,
    ),
    "languages": Grid(
        "In-context language learning: words of an automaton that changes with each sequence",
        tuple(Job(layer, f"{RECALL}:languages,{layer}", {"steps": 1000}) for layer in EACH_KIND),
        {f"accuracy_{n}": f"T = {n}" for n in (256, 512)},
        "accuracy_512",
    ),
    "games": Grid(
        "Games of memory: the return of PPO",
        tuple(
            Job(f"{game}, {layer}", f"{CONTROL}:{game},{layer}", {})
            for game, layer in itertools.product(
                ("repeat_previous", "autoencode"), ("gru", "ffm", "lru", "mingru", "deltanet")
            )
        ),
        {"return": "return"},
        "return",
    ),
    "listops": Grid(
        "ListOps, expressions of 50 to 200 tokens",
        each(CLASSIFY, "listops", ("lru", "s5")),
        BESIDE_MAJORITY,
        "accuracy",
        {"lru": "60.2 %", "s5": "62.2 %"},
        "arXiv 2303.06349 and 2208.04933, expressions of 500 to 2,000 tokens",
    ),
    "packages": Grid(
        "Packages: 512 bytes of source code from one of six packages",
        each(CLASSIFY, "packages", ("lru", "s5")),
        BESIDE_MAJORITY,
        "accuracy",
    ),
    "digits": Grid(
        "Digits: 8 x 8 pixels as a sequence",
        each(CLASSIFY, "digits", ("lru", "s5", "gru")),
        BESIDE_MAJORITY,
        "accuracy",
    ),
    "image_digits": Grid(
        "Digits: 8 x 8 pixels as an image",
        (
            *each(IMAGE, "image_digits", GRIDDED[:2]),
            # A step takes 14 times the processor time of a step of pLSTM.
            Job("chimera", f"{IMAGE}:image_digits,chimera", {"steps": 300, "eval_every": 60}),
        ),
        BESIDE_MAJORITY,
        "accuracy",
    ),
    "arrows": Grid(
        "Arrow pointing, trained on 8 x 8 pixels",
        each(IMAGE, "arrows", GRIDDED),
        {f"accuracy_{n}": f"{n} x {n}" for n in (8, 12, 16)},
        "accuracy_16",
    ),
    "time_series": Grid(
        "Time series: data sets of aeon",
        tuple(
            Job(f"{layer}, {name}", f"{CLASSIFY}:time_series,{layer}", {"task.path": name})
            for name, layer in itertools.product(
                ("BasicMotions", "JapaneseVowels", "OSULeaf"), ("lru", "s5")
            )
        ),
        BESIDE_MAJORITY,
        "accuracy",
    ),
} | language.GRIDS
# Grids whose results the first section of the report shows as a map of layers by tasks.
TRACKING = ("parity", "modular_arithmetic", "S3", "A5", "S5", "deltaproduct")
