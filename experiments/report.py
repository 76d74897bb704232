"""Tables and figures of the results of `experiments.sweep`.

    python -m experiments.report > experiments/results/RESULTS.md
    python -m experiments.report --results=longer.jsonl --figures=figures > longer.md

Jobs with the same label differ by learning rate. The table shows the job with the best median over
seeds. Numbers are medians over seeds, followed by the least and the greatest.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

from experiments import sweep
from experiments.base import cli, figures
from experiments.base.errors import UserError
from experiments.configs import lm
from experiments.sweeps.grids import GRIDS, Grid, Job
from experiments.sweeps.texts import TEXTS

Rows = list[dict[str, Any]]
Chosen = dict[str, tuple[dict[str, Any], Rows]]  # label -> overrides of its best job, and rows
OURS = Path(sweep.RESULTS).name  # the answers describe only these results
COMMAND = "python -m experiments.sweep --grids="
HEAD = """# Results

Results of the configurations in `experiments/configs`, next to published results. Runs are small:
the configurations document sizes, steps and departures from the papers. Each section has a
question, the setup, a table or figure, and the answer in bold. Numbers of several seeds are
medians, with the least and the greatest in parentheses. `python -m experiments.report` prints this
page from `experiments/results/results.jsonl`, which `python -m experiments.sweep` writes.
"""


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("results", sweep.RESULTS, "File with the results.", flag_values=values)
    flags.DEFINE_string("figures", "experiments/results", "Folder for figures.", flag_values=values)


def main(values: Any) -> int:
    """Print the report."""
    rows = sweep.read(Path(values.results))
    if not rows:
        raise UserError(f"no results in {values.results}: run python -m experiments.sweep first")
    Path(values.figures).mkdir(parents=True, exist_ok=True)
    print(HEAD)
    for name, grid in GRIDS.items():
        groups = by_settings(grid, [row for row in rows if row["grid"] == name])
        text = TEXTS.get(name)
        print(f"## {grid.title}\n")
        if text:
            print(f"{text.question} {text.setup}\n")
        if not groups:
            print(f"Not run yet: `{COMMAND}{name}`.\n")
        # Results without --set come first.
        for settings in sorted(groups):
            if settings:
                print(f"### With `{settings.strip()}`\n")
            print(table(grid, groups[settings]))
            if grid.figure:
                path = Path(values.figures) / f"{name}{_short(settings)}.png"
                figure(path, grid, groups[settings])
                print(f"![{name}]({path.name})\n")
            if text and text.answer and not settings and Path(values.results).name == OURS:
                print(f"**{text.answer}** {text.details}".rstrip() + "\n")
            print(f"{made_with(name, grid, groups[settings], settings)}\n")
    return 0


def by_settings(grid: Grid, rows: Rows) -> dict[str, Rows]:
    """Group rows by their `--set` flags; rows of jobs that the grid no longer has are dropped.

    The keys are the flags as text.
    """
    groups: dict[str, Rows] = {}
    for row in rows:
        if any(_is_of(row, job) for job in grid.jobs):
            settings = (
                f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                for name, value in sorted(row.get("set", {}).items())
            )
            flags = "".join(f" --set={shlex.quote(text)}" for text in settings)
            groups.setdefault(flags, []).append(row)
    return groups


def _short(settings: str) -> str:
    """Return a file name suffix for settings: a hash, because names may differ by a sign only."""
    return "-" + hashlib.sha256(settings.encode()).hexdigest()[:8] if settings else ""


def _is_of(row: dict[str, Any], job: Job) -> bool:
    """Return whether a row is a result of this job."""
    wanted = job.overrides | row.get("set", {}) | {"seed": row["overrides"]["seed"]}
    named = (job.config, job.label) == (row["config"], row["label"])
    return named and wanted == row["overrides"]


def best(grid: Grid, rows: Rows) -> Chosen:
    """Return the overrides of the best job and its rows, one per seed, for each label."""
    groups: dict[str, dict[str, tuple[dict[str, Any], Rows]]] = {}
    for row in rows:
        overrides = {name: x for name, x in row["overrides"].items() if name != "seed"}
        _, same = groups.setdefault(row["label"], {}).setdefault(str(overrides), (overrides, []))
        same.append(row)

    def score(entry: tuple[dict[str, Any], Rows]) -> float:
        scores = numbers(entry[1], grid.metric)
        middle = statistics.median(scores) if scores else float("-inf")
        return -middle if grid.lower and scores else middle

    labels = dict.fromkeys(job.label for job in grid.jobs)
    return {label: max(groups[label].values(), key=score) for label in labels if label in groups}


def numbers(rows: Rows, name: str) -> list[float]:
    """Return a number of the summary of every finished run."""
    return [row["summary"][name] for row in rows if name in row.get("summary", {})]


def table(grid: Grid, rows: Rows) -> str:
    """Format the results of a grid as Markdown."""
    with_published = bool(grid.published)
    head = ["", *grid.columns.values(), *(["horizon"] if grid.answers else [])]
    head += ["published"] if with_published else []
    head += ["steps", "seeds", "learning rate", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    chosen = best(grid, rows)
    for label, (overrides, same) in chosen.items():
        cells = [label, *(_cell(grid, column, chosen, same) for column in grid.columns)]
        if grid.answers:
            cells.append(_horizon(grid, same))
        if with_published:
            cells.append(grid.published.get(label, ""))
        steps = numbers(same, "step")
        cells.append(f"{statistics.median(steps):,.0f}" if steps else "")
        ended = len(steps)
        seeds = str(len(same)) + (f", {len(same) - ended} diverged" if ended < len(same) else "")
        minutes = statistics.median(row["seconds"] for row in same) / 60
        rate = overrides.get("optimizer.learning_rate", "")
        lines.append("| " + " | ".join([*cells, seeds, str(rate), f"{minutes:.1f}"]) + " |")
    if grid.source:
        lines += ["", f"Published: {grid.source}."]
    if grid.answers:
        lines += [
            "",
            "Horizon: number of right answers beyond chance in one of the longest test sequences,"
            f" which have {grid.answers} answers.",
        ]
    return "\n".join(lines) + "\n"


def _horizon(grid: Grid, rows: Rows) -> str:
    """Return the number of right answers beyond chance in a longest test sequence.

    A model that knows the answers to the first n symbols, and guesses later, has the horizon n.
    """
    scores = numbers(rows, "scaled_accuracy")
    return f"{statistics.median(scores) * grid.answers:.1f}" if scores else ""


def _cell(grid: Grid, column: str, chosen: Chosen, same: Rows) -> str:
    """Return the cell of a column for the runs `same`: the number, or its ratio to a label's."""
    scores = numbers(same, column)
    if (label := grid.relative.get(column)) is None:
        return _spread(scores)
    units = numbers(chosen[label][1], column) if label in chosen else []
    return _spread([score / statistics.median(units) for score in scores]) if units else ""


def _missing(grid: Grid, rows: Rows) -> int:
    """Return the number of jobs without a row for any seed."""
    return sum(not any(_is_of(row, job) for row in rows) for job in grid.jobs)


def made_with(name: str, grid: Grid, rows: Rows, settings: str = "") -> str:
    """Describe the runs of a grid: command, time, versions, cores, and jobs that have not run.

    `settings` are the `--set` flags of the runs.
    """
    hours = sum(row["seconds"] for row in rows) / 3600
    versions_of = {name: {row["versions"][name] for row in rows} for name in rows[-1]["versions"]}
    versions = ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in versions_of.items())
    cores = " and ".join(map(str, sorted({row["cores"] for row in rows})))
    left = _missing(grid, rows)
    partly = f"; {left} of {len(grid.jobs)} jobs have not run" if left else ""
    return (
        f"`{COMMAND}{name}{settings}`: {hours:.1f} hours, {versions}, CPU cores: {cores}{partly}."
    )


def _spread(scores: list[float]) -> str:
    """Return the median, followed by the least and the greatest of several numbers."""
    if not scores:
        return ""
    middle = statistics.median(scores)
    text = f"{middle:,.0f}" if middle > 100 else f"{middle:.3f}"
    return text if len(scores) < 2 else f"{text} ({min(scores):.3f} to {max(scores):.3f})"


def figure(path: Path, grid: Grid, rows: Rows) -> None:
    """Plot the figure of a grid, with a line for every layer."""
    curves = grid.figure == "curve"
    lines = _curves(grid, rows) if curves else _points(grid, rows)
    names = ["seconds, compilation left out", "tokens"] if curves else [grid.figure.split(".")[-1]]
    drawing, axes = figures.panels(len(names), (11 if curves else 7.5, 4.2), sharey=True)
    last = {layer: max(points)[1] for layer, points in lines[-1].items()}
    order = sorted(last, key=last.__getitem__)
    looks = {layer: figures.look(index) for index, layer in enumerate(order)}
    for axis, name, by_layer in zip(axes, names, lines, strict=True):
        for layer in order:
            axis.plot(*zip(*sorted(by_layer[layer]), strict=True), **looks[layer])
        axis.set_xlabel(name)
        axis.set_xscale("log")
        every = sorted({x for points in by_layer.values() for x, _ in points})
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if curves else FixedLocator(every))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    label = grid.columns.get(grid.metric, grid.metric)
    if curves:
        label += _curve_coverage(rows)
    axes[0].set_ylabel(label)
    ends = {layer: max(lines[-1][layer]) for layer in order}
    figures.name_lines(axes[-1], ends, [looks[layer]["color"] for layer in order])
    drawing.savefig(path, dpi=110)


Lines = dict[str, list[tuple[float, float]]]


def _points(grid: Grid, rows: Rows) -> list[Lines]:
    """Return the points of the metric over the override `grid.figure`."""
    lines: Lines = {}
    for label, (overrides, same) in best(grid, rows).items():
        scores = numbers(same, grid.metric)
        if scores:
            point = (overrides[grid.figure], statistics.median(scores))
            lines.setdefault(label.split(",")[0], []).append(point)
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


def _curves(grid: Grid, rows: Rows) -> list[Lines]:
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


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
