"""Figures of the results of sweeps."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    NullLocator,
    StrMethodFormatter,
)

from experiments.base import figures
from experiments.configs import lm
from experiments.sweeps.jobs import Grid
from experiments.sweeps.results import Rows, best, numbers
from experiments.tasks import state_tracking

Lines = dict[str, list[tuple[float, float]]]
Cells = dict[tuple[str, str], list[float]]  # (layer, task) -> scaled accuracy at each length


def figure(path: Path, grid: Grid, rows: Rows) -> None:
    """Plot the figure of a grid: a line for every layer, or a map of layers by tasks."""
    if grid.figure == "map":
        tracking_map(path, grid, tracking_cells(grid, rows))
        return
    over_time = grid.figure == "curve"
    lines = curves(grid, rows) if over_time else _points(grid, rows)
    names = [grid.axis or grid.figure.split(".")[-1]]
    if over_time:
        names = ["seconds, compilation left out", "tokens"]
    drawing, axes = figures.panels(len(names), (11 if over_time else 7.5, 4.2), sharey=True)
    last = {layer: max(points)[1] for layer, points in lines[-1].items()}
    order = sorted(last, key=last.__getitem__)
    looks = {layer: figures.look(index) for index, layer in enumerate(order)}
    for axis, name, by_layer in zip(axes, names, lines, strict=True):
        for layer in order:
            axis.plot(*zip(*sorted(by_layer[layer]), strict=True), **looks[layer])
        axis.set_xlabel(name)
        if grid.figure == "label":
            axis.set_xticks(range(len(_ticks(grid))), _ticks(grid))
            continue
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        if over_time:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            every = sorted({x for points in by_layer.values() for x, _ in points})
            axis.xaxis.set_major_locator(FixedLocator(every))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    label = grid.columns.get(grid.metric, grid.metric)
    if over_time:
        label += _curve_coverage(rows)
    if label.startswith("T = "):
        name = re.sub(r"_\d+$", "", grid.metric).replace("_", " ")
        label = name if grid.figure == "length" else f"{name} at {label}"
    axes[0].set_ylabel(label)
    ends = {layer: max(lines[-1][layer]) for layer in order}
    figures.name_lines(axes[-1], ends, [looks[layer]["color"] for layer in order])
    drawing.savefig(path, dpi=110)


def tracking_cells(grid: Grid, rows: Rows) -> Cells:
    """Return the medians of the accuracies, scaled so that guessing has 0."""
    names = [name for name in grid.columns if name.startswith("accuracy_")]
    cells: Cells = {}
    for label, (_, same) in best(grid, rows).items():
        ended = [row["summary"] for row in same if "chance" in row.get("summary", {})]
        if ended:
            task, word = same[0]["config"].split(":")[1].split(",")[:2]
            layer = label.removeprefix(f"{task}, ")
            layer = layer if layer.startswith(word) else f"{word}, {layer}"
            cells[layer, task] = [
                statistics.median((s[name] - s["chance"]) / (1 - s["chance"]) for s in ended)
                for name in names
            ]
    return cells


def tracking_map(path: Path, grid: Grid, cells: Cells) -> None:
    """Plot cells at the shortest and at the longest test length of a grid."""
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    known = {task for _, task in cells}
    tasks = {name: name.replace("_", "\n") for name in state_tracking.NAMES if name in known}
    lengths = [title for name, title in grid.columns.items() if name.startswith("accuracy_")]
    drawing, axes = figures.panels(2, (10, 0.9 + 0.3 * len(layers)), sharey=True)
    for axis, k in zip(axes, (0, -1), strict=True):
        values = {(layer, tasks[task]): scores[k] for (layer, task), scores in cells.items()}
        figures.draw_map(axis, values, layers, list(tasks.values()))
        axis.set_title(lengths[k], fontsize="medium")
    drawing.savefig(path, dpi=110)


def _ticks(grid: Grid) -> list[str]:
    """Return the ends of the labels, in the order of the jobs."""
    return list(dict.fromkeys(job.label.partition(", ")[2] for job in grid.jobs))


def _points(grid: Grid, rows: Rows) -> list[Lines]:
    """Return the points of the metric over the override, the length or the end of the label."""
    lines: Lines = {}
    for label, (overrides, same) in best(grid, rows).items():
        if grid.figure == "length":
            scored = {int(name.rpartition("_")[2]): numbers(same, name) for name in grid.columns}
            name = label
        else:
            name, _, tick = label.partition(", ")
            x = _ticks(grid).index(tick) if grid.figure == "label" else overrides[grid.figure]
            scored = {x: numbers(same, grid.metric)}
        points = [(float(x), statistics.median(scores)) for x, scores in scored.items() if scores]
        if points:
            lines.setdefault(name, []).extend(points)
    if grid.figure == "label" and len(lines) > 1:
        # A model without recurrent blocks is the first point of every line.
        start = lines.pop("attention", [])
        lines = {name: start + points for name, points in lines.items()}
    return [lines]


def _curve_coverage(rows: Rows) -> str:
    """Describe how much text the mid-run evaluations read, less than the final evaluation."""
    default = lm.get_config().eval.bytes
    sizes = {
        min(row["overrides"].get("eval.bytes", default), row["summary"]["heldout_bytes"])
        for row in rows
        if "heldout_bytes" in row.get("summary", {})
    }
    return f", first {max(sizes):,} held-out bytes" if len(sizes) == 1 else ""


def curves(grid: Grid, rows: Rows) -> list[Lines]:
    """Return the metric over seconds at the mean speed, and over tokens, of the first seed."""
    by_tokens: Lines = {}
    by_seconds: Lines = {}
    for label, (_, same) in best(grid, rows).items():
        # A run of a single step has no measured speed.
        ended = [row for row in same if row.get("curve") and numbers([row], "tokens_per_second")]
        for row in ended[:1]:
            summary = row["summary"]
            each = summary["tokens"] / summary["step"]
            by_tokens[label] = [(step * each, value) for step, value in row["curve"]]
            speed = summary["tokens_per_second"]
            by_seconds[label] = [(tokens / speed, value) for tokens, value in by_tokens[label]]
    return [by_seconds, by_tokens]
