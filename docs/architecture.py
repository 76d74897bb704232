"""Draws the picture of the architecture, docs/architecture.svg: python docs/architecture.py."""

import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# (left, bottom, width, name, description, contents)
FLOORS = [
    (0, 0.0, 12, "pallas_kernels", "kernels for TPU and GPU, on arrays", ""),
    (
        0,
        1.5,
        12,
        "seqjax.ops",
        "recurrences as pure functions of arrays, with one contract",
        "linear_scan  selective_scan  ssm_scan  block_scan  linear_attention  delta_rule ..."
        "  nonlinear_scan  monoid_scan  step_scan",
    ),
    (
        0,
        3.0,
        12,
        "seqjax.cells",
        "one step of a nonlinear RNN",
        "GRU  LSTM  ParaGRU  ParaLSTM  sLSTM ...",
    ),
    (
        0,
        4.5,
        12,
        "seqjax.layers",
        "hyperparameters only: init, apply, step, initial_state, param_axes",
        "LRU  S5  Mamba  Mamba2  DeltaNet  RWKV7  MLSTM  RGLRU  GRU ...  Attention  ShortConv  MLP",
    ),
    (
        0,
        6.0,
        12,
        "seqjax.models",
        "a stack of layers is a layer too",
        "Backbone   LanguageModel   Classifier",
    ),
    (0, 7.5, 2.9, "generation", "tokens from a model", "generate  stream"),
    (3.0, 7.5, 2.9, "pretrained", "published checkpoints", "load  save"),
    (6.0, 7.5, 2.9, "sharding", "meshes, shardings", "make_mesh  shard"),
    (9.0, 7.5, 3.0, "nnx  linen", "inside Flax", "Recurrent"),
    (0, 9.0, 7, "experiments", "train, evaluate, generate, plan, bench, sweep, report", ""),
    (7.2, 9.0, 4.8, "notebooks", "tutorials", ""),
]
COLORS = [
    "#e7cb94",
    "#9ecae1",
    "#c6dbef",
    "#a1d99b",
    "#c7e9c0",
    "#fdd0a2",
    "#fdd0a2",
    "#fdd0a2",
    "#dadaeb",
    "#eeeeee",
    "#eeeeee",
]


def main() -> None:
    """Write the picture beside this file."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "seqjax", "font.size": 10})
    figure, axis = plt.subplots(figsize=(9.5, 7.2), layout="constrained")
    for (left, bottom, width, name, what, holds), color in zip(FLOORS, COLORS, strict=True):
        axis.add_patch(plt.Rectangle((left, bottom), width, 1.2, facecolor=color, edgecolor="0.4"))
        middle = left + width / 2
        lines = [
            (name, "bold", 10, "black"),
            (what, "normal", 9, "0.2"),
            (holds, "normal", 8, "0.3"),
        ]
        lines = [line for line in lines if line[0]]
        for i, (text, weight, size, shade) in enumerate(lines):
            height = bottom + 1.2 * (len(lines) - i - 0.5) / len(lines)
            axis.text(
                middle,
                height,
                text,
                ha="center",
                va="center",
                weight=weight,
                size=size,
                color=shade,
            )
    axis.annotate(
        "",
        (12.5, 10.2),
        (12.5, 0),
        arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.5},
    )
    axis.text(
        12.65, 5.1, "each imports only what is below it", rotation=90, va="center", color="0.3"
    )
    axis.set(xlim=(-0.1, 13.1), ylim=(-0.1, 10.3))
    axis.axis("off")
    where = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(where, metadata={"Date": None})


if __name__ == "__main__":
    main()
