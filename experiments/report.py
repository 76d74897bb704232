"""Tables and figures of the results of `experiments.sweep`.

    python -m experiments.report > experiments/results/RESULTS.md
    python -m experiments.report --results=longer.jsonl --figures=figures > longer.md

Jobs with the same label differ by learning rate. The table shows the job with the best median over
seeds. Numbers are medians over seeds, followed by the least and the greatest.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import sweep
from experiments.base import cli
from experiments.base.errors import UserError
from experiments.sweeps.grids import GRIDS, TRACKING
from experiments.sweeps.jobs import Grid
from experiments.sweeps.plots import Cells, figure, tracking_cells, tracking_map
from experiments.sweeps.results import Chosen, Rows, best, by_settings, is_of, numbers
from experiments.sweeps.texts import TEXTS, TRACKING_TEXT, Text

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
    ours = Path(values.results).name == OURS
    print(HEAD)
    grouped = {
        name: by_settings(grid, [row for row in rows if row["grid"] == name])
        for name, grid in GRIDS.items()
    }
    print(overview(Path(values.figures), grouped, ours), end="")
    for name, grid in GRIDS.items():
        groups, text = grouped[name], TEXTS.get(name)
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
            if grid.figure and numbers(groups[settings], grid.metric):
                path = Path(values.figures) / f"{name}{_short(settings)}.png"
                figure(path, grid, groups[settings])
                print(f"![{name}]({path.name})\n")
            if text and text.answer and not settings and ours:
                print(_answer(text))
            print(f"{made_with(name, grid, groups[settings], settings)}\n")
    return 0


def _answer(text: Text) -> str:
    """Format the answer of a section and its details."""
    return f"**{text.answer}** {text.details}".rstrip() + "\n"


def overview(folder: Path, grouped: dict[str, dict[str, Rows]], ours: bool) -> str:
    """Plot the results of all grids in `TRACKING` as a map, and return the section with it.

    Args:
      folder: folder of the figure.

      grouped: results by grid and by settings. Only results without settings are in the map.

      ours: whether the stored answer is about these results.
    """
    cells: Cells = {}
    for name in TRACKING:
        cells |= tracking_cells(GRIDS[name], grouped[name].get("", []))
    if not cells:
        return ""
    tracking_map(folder / "state_tracking.png", GRIDS[TRACKING[0]], cells)
    text = TRACKING_TEXT
    return (
        f"## State tracking: layers by tasks\n\n{text.question} {text.setup}\n\n"
        f"![state tracking](state_tracking.png)\n\n"
        + (f"{_answer(text)}\n" if ours else "")
        + f"Results of the grids {', '.join(f'`{name}`' for name in TRACKING)}.\n\n"
    )


def _short(settings: str) -> str:
    """Return a file name suffix for settings: a hash, because names may differ by a sign only."""
    return "-" + hashlib.sha256(settings.encode()).hexdigest()[:8] if settings else ""


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
    return sum(not any(is_of(row, job) for row in rows) for job in grid.jobs)


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


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
