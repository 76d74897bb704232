"""Runs grids of experiments one after another; start it again and it goes on where it was.

    python -m experiments.sweep --grids=parity,mqar --seeds=0,1
    python -m experiments.sweep --grids=A5 --set=steps=10000 --results=longer.jsonl

Each run is a training run in a process and a folder of its own. What it reached becomes one line of
the results, a file of JSON lines that `python -m experiments.report` makes tables of; a run that
diverges leaves a line that says so, and one that cannot run stops the sweep.
`python -m experiments.train --help` lists the fields that `--set` takes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from experiments.base import cli, logs
from experiments.base.errors import DivergedError, UserError, nearest
from experiments.sweeps.grids import GRIDS, Job

RESULTS = "experiments/results/results.jsonl"


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags of this script."""
    flags.DEFINE_list("grids", [], f"Of {', '.join(GRIDS)}; all if empty.", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "Seeds of every job.", flag_values=values)
    flags.DEFINE_string("results", RESULTS, "Where results are appended.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/sweep", "Folder of the runs.", flag_values=values)
    flags.DEFINE_multi_string(
        "set",
        [],
        "A field for every job, as steps=10; kept in the results. May be given several times.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Runs what the flags name and what is not in the results yet."""
    names = values.grids or list(GRIDS)
    for name in names:
        if name not in GRIDS:
            raise UserError(f"--grids: unknown grid {name!r}: {nearest(name, GRIDS)}")
    extra = dict(_field(text) for text in values.set)
    wanted = [
        (name, job, extra, _integer(seed))
        for seed in values.seeds
        for name in names
        for job in GRIDS[name].jobs
    ]
    return sweep(wanted, Path(values.results), Path(values.workdir))


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set={text}: write field=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--seeds={text}: must be an integer") from None


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far; a last line cut short by a kill is left out."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().split("\n")[:-1]]


def _drop_unfinished(results: Path) -> None:
    """Takes a line off that a kill cut short, so that the next one starts on its own."""
    if results.exists() and not (text := results.read_text()).endswith("\n"):
        temporary = results.with_suffix(".tmp")
        temporary.write_text(text[: text.rfind("\n") + 1])
        os.replace(temporary, results)


def sweep(wanted: list[tuple[str, Job, dict[str, Any], int]], results: Path, workdir: Path) -> int:
    """Runs the (grid, job, fields set, seed) that have no line yet; returns an exit code."""
    _drop_unfinished(results)
    done = {key(row["grid"], row["config"], row["overrides"]) for row in read(results)}
    left = []
    for grid, job, extra, seed in wanted:
        overrides = job.overrides | extra | {"seed": seed}
        if (name := key(grid, job.config, overrides)) not in done:
            done.add(name)  # jobs that differ in what is set are one
            left.append((grid, job, extra, overrides))
    print(f"{len(wanted) - len(left)} of {len(wanted)} runs are in {results}", flush=True)
    bar = tqdm.tqdm(left, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for number, (grid, job, extra, overrides) in enumerate(bar, start=1):
        bar.set_postfix_str(f"{grid}: {job.label}")
        row = run(grid, job, overrides, workdir / key(grid, job.config, overrides))
        if row is None:
            print("stopped; start the same command again to go on", flush=True)
            return 130
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(row | {"set": extra}) + "\n")
        said = row.get("error") or ", ".join(
            f"{name} {row['summary'][name]:.3f}"
            for name in GRIDS[grid].columns
            if name in row["summary"]
        )
        bar.write(f"{number}/{len(left)} {grid}, {job.label}, seed {overrides['seed']}: {said}")
        sys.stdout.flush()
    return 0


def key(grid: str, config: str, overrides: dict[str, Any]) -> str:
    """A name for a run that is the same whenever the run is."""
    text = json.dumps([grid, config, overrides], sort_keys=True)
    return f"{grid}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run(grid: str, job: Job, overrides: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """One run: its line of the results, or None if it was stopped."""
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "experiments.train", f"--config={job.config}", *arguments]
    started = time.perf_counter()
    done = subprocess.run([*command, f"--workdir={folder}"], capture_output=True, text=True)
    if done.returncode in (130, 143, -2, -15):
        return None
    row = {
        "grid": grid,
        "label": job.label,
        "config": job.config,
        "overrides": overrides,
        "seconds": round(time.perf_counter() - started, 1),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "seqjax")},
    }
    if done.returncode == DivergedError.exit_code:  # which is a result too
        return row | {"error": done.stderr.strip().splitlines()[-1]}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{' '.join(command)} failed: {last}")
    metric = GRIDS[grid].metric
    return row | {
        "summary": json.loads((folder / "summary.json").read_text()),
        "curve": [[x["step"], x[metric]] for x in logs.read_rows(folder) if metric in x],
    }


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
