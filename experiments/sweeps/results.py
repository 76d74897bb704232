"""Results of sweeps: rows by settings, and the best job of each label."""

from __future__ import annotations

import json
import shlex
import statistics
from typing import Any

from experiments.sweeps.jobs import Grid, Job

Rows = list[dict[str, Any]]
Chosen = dict[str, tuple[dict[str, Any], Rows]]  # label -> overrides of its best job, and rows


def by_settings(grid: Grid, rows: Rows) -> dict[str, Rows]:
    """Group rows by their `--set` flags; rows of jobs that the grid no longer has are dropped.

    The keys are the flags as text.
    """
    groups: dict[str, Rows] = {}
    for row in rows:
        if any(is_of(row, job) for job in grid.jobs):
            settings = (
                f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                for name, value in sorted(row.get("set", {}).items())
            )
            flags = "".join(f" --set={shlex.quote(text)}" for text in settings)
            groups.setdefault(flags, []).append(row)
    return groups


def is_of(row: dict[str, Any], job: Job) -> bool:
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
