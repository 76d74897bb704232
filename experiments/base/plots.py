"""The curves of a run as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.base.figures import COLORS

_TRAIN, _, _RATE, _HELDOUT, _NORM, _, _FINAL = COLORS


def save_curves(
    path: Path,
    rows: list[dict[str, Any]],
    title: str,
    objective: Any,
    final: dict[str, Any] | None = None,
) -> None:
    """Plot the training curve and the evaluations over steps.

    Both share an axis if they have the same unit. A second panel shows the learning rate and the
    gradient norm.

    Args:
      path: file of the figure.

      rows: rows of the metrics file.

      title: title of the figure.

      objective: the objective, which names the curve, the metric and the evaluated data.

      final: step and result of the evaluation after the last step, if there was one.
    """
    curve, metric = objective.curve, objective.metric
    train = [row for row in rows if "loss" in row]
    heldout = [row for row in rows if metric in row]
    steps = np.array([row["step"] for row in train])
    bits = np.array([row[curve] for row in train])

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.set_title(title)
    top.plot(steps, bits, color=_TRAIN, alpha=0.25, linewidth=0.8, label="train, each step")
    width = max(len(bits) // 40, 1)
    smooth = np.convolve(bits, np.full(width, 1 / width), mode="valid")
    top.plot(
        steps[width - 1 :], smooth, color=_TRAIN, linewidth=1.8, label=f"train, mean of {width}"
    )
    if heldout:
        points = [row[metric] for row in heldout]
        same = metric.endswith(curve)
        axis = top if same else top.twinx()
        name, read = "held-out" if same else metric, objective.coverage(heldout[-1])
        # Logs of older versions do not say which data an evaluation read.
        top.plot([], [], "o-", color=_HELDOUT, label=f"{name}, {read}" if read else name)
        axis.plot([row["step"] for row in heldout], points, "o-", color=_HELDOUT)
        if final and objective.coverage(final) != read:
            label = f"{name} at the end, {objective.coverage(final)}"
            top.plot([], [], "D", color=_FINAL, label=label)
            axis.plot(final["step"], final[metric], "D", color=_FINAL)
            axis.annotate(
                f"{final[metric]:.3f}",
                (final["step"], final[metric]),
                textcoords="offset points",
                xytext=(0, 8),
                ha="center",
                color=_FINAL,
            )
        if not same:
            axis.set_ylim(-0.03, 1.03)
            axis.set_ylabel(metric, color=_HELDOUT)
            axis.spines["top"].set_visible(False)
        axis.annotate(
            f"{points[-1]:.3f}",
            (heldout[-1]["step"], points[-1]),
            textcoords="offset points",
            xytext=(0, -16),
            ha="center",
            color=_HELDOUT,
        )
    top.set_ylabel(curve.replace("_", " "))
    # The first steps are far above the rest and would flatten it.
    late = bits[len(bits) // 20 :]
    if late.size and metric.endswith(curve):
        top.set_ylim(bottom=max(0.0, late.min() - 0.3), top=late.max() + 0.3)
    top.legend(frameon=False)

    rate.plot(steps, [row["learning_rate"] for row in train], color=_RATE)
    rate.set_ylabel("learning rate", color=_RATE)
    rate.set_xlabel("step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm = rate.twinx()
    norm.plot(steps, [row["gradient_norm"] for row in train], color=_NORM, alpha=0.6, linewidth=0.8)
    norm.set_yscale("log")
    norm.set_ylabel("gradient norm", color=_NORM)
    for axis in (top, rate):
        axis.grid(alpha=0.25)
        axis.spines["top"].set_visible(False)
    top.spines["right"].set_visible(False)
    norm.spines["top"].set_visible(False)
    figure.savefig(path, dpi=120)
