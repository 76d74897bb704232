"""Sweeps: grids of training runs, one after another; the same command again resumes a sweep.

    python -m experiments.sweep --grids=parity,mqar --seeds=0,1
    python -m experiments.sweep --grids=A5 --set=steps=10000 --results=longer.jsonl

Each job is a training run in a separate process and folder. Its result is one line of a JSON-lines
file, from which `python -m experiments.report` makes tables. A run that diverges leaves a line with
its error. A run that cannot start stops the sweep. Ctrl-C lets the current run save a checkpoint; a
second Ctrl-C terminates the run. Sweeps with the same results file and the same folder of runs
share the jobs: start the same command once per core.
`python -m experiments.train --help` lists the fields that `--set` takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from experiments.base import cli, logs
from experiments.base.errors import DivergedError, UserError, nearest
from experiments.sweeps.grids import GRIDS
from experiments.sweeps.jobs import Job
from experiments.training.interrupt import Interrupt

if sys.platform != "win32":  # Windows has no `fcntl`: start one sweep at a time there
    import fcntl

RESULTS = "experiments/results/results.jsonl"
WAITING = (
    "waiting for the current run to save its checkpoint; a second Ctrl-C terminates the run "
    "without saving"
)


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_list(
        "grids", [], f"Grids to run: {', '.join(GRIDS)}; empty: all.", flag_values=values
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds of every job.", flag_values=values)
    flags.DEFINE_string("results", RESULTS, "File to append results to.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/sweep", "Folder of the runs.", flag_values=values)
    flags.DEFINE_multi_string(
        "set",
        [],
        "Field to set in every job, such as steps=10; stored in the results. Can be repeated.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Run the selected jobs that have no result yet."""
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
    """Return the stored results, without a last line that a kill cut short."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().split("\n")[:-1]]


def _drop_unfinished(results: Path) -> None:
    """Remove a last line that a kill cut short, so that the next result starts a new line."""
    if results.exists() and not (text := results.read_text()).endswith("\n"):
        temporary = results.with_suffix(".tmp")
        temporary.write_text(text[: text.rfind("\n") + 1])
        os.replace(temporary, results)


def _finished(results: Path) -> set[str]:
    """Return the names of the runs that have a result."""
    return {key(row["grid"], row["config"], row["overrides"]) for row in read(results)}


@contextlib.contextmanager
def _claim(folder: Path, results: Path) -> Iterator[bool]:
    """Lock the folder of a run; yield whether this sweep must do the run.

    It must not if another sweep has the lock, or has finished the run since this one started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        # A sweep writes its result before it releases the lock.
        yield folder.name not in _finished(results)


def sweep(wanted: list[tuple[str, Job, dict[str, Any], int]], results: Path, workdir: Path) -> int:
    """Run each (grid, job, fields of --set, seed) that has no result; return an exit code."""
    _drop_unfinished(results)
    done = _finished(results)
    left = []
    for grid, job, extra, seed in wanted:
        overrides = job.overrides | extra | {"seed": seed}
        if (name := key(grid, job.config, overrides)) not in done:
            done.add(name)  # several jobs may differ only in fields that --set replaces
            left.append((grid, job, extra, overrides))
    print(f"{len(wanted) - len(left)} of {len(wanted)} runs are in {results}", flush=True)
    bar = tqdm.tqdm(left, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with Interrupt(WAITING) as interrupt:
        for number, (grid, job, extra, overrides) in enumerate(bar, start=1):
            bar.set_postfix_str(f"{grid}: {job.label}")
            folder = workdir / key(grid, job.config, overrides)
            name = f"{grid}, {job.label}, seed {overrides['seed']}"
            with _claim(folder, results) as needed:
                if not needed:
                    bar.write(f"{number}/{len(left)} {name}: left to another sweep")
                    continue
                row = run(grid, job, overrides, folder, interrupt)
                if row is not None:
                    results.parent.mkdir(parents=True, exist_ok=True)
                    # In one piece, because another sweep may write at the same time.
                    with results.open("ab", buffering=0) as file:
                        file.write((json.dumps(row | {"set": extra}) + "\n").encode())
            if row is not None:
                text = row.get("error") or _numbers(grid, row["summary"])
                bar.write(f"{number}/{len(left)} {name}: {text}")
                sys.stdout.flush()
            if row is None or (interrupt.signal and number < len(left)):
                print("stopped; start the same command again to resume", flush=True)
                return interrupt.exit_code if interrupt.signal else 130
    return 0


def _numbers(grid: str, summary: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {summary[name]:.3f}" for name in GRIDS[grid].columns if name in summary
    )


def key(grid: str, config: str, overrides: dict[str, Any]) -> str:
    """Return the name of a run, a function of grid, configuration and overrides."""
    text = json.dumps([grid, config, overrides], sort_keys=True)
    return f"{grid}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run(
    grid: str, job: Job, overrides: dict[str, Any], folder: Path, interrupt: Interrupt
) -> dict[str, Any] | None:
    """Train one job; return its line of the results, or None if it was stopped."""
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "experiments.train", f"--config={job.config}", *arguments]
    started = time.perf_counter()
    done = execute([*command, f"--workdir={folder}"], interrupt)
    if done.returncode in (129, 130, 143, -1, -2, -15):
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
    if done.returncode == DivergedError.exit_code:  # divergence is a result too
        return row | {"error": done.stderr.strip().splitlines()[-1]}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{' '.join(command)} failed: {last}")
    metric = GRIDS[grid].metric
    return row | {
        "summary": json.loads((folder / "summary.json").read_text()),
        "curve": [[x["step"], x[metric]] for x in logs.read_rows(folder) if metric in x],
    }


def execute(command: list[str], interrupt: Interrupt) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its output.

    The command runs in a new session. A terminal sends Ctrl-C to its whole process group, and a
    second signal would stop the training run without saving. The first signal that `interrupt`
    receives is forwarded once, as SIGINT. A second Ctrl-C raises KeyboardInterrupt, which
    terminates the command.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        forwarded = False
        try:
            while True:
                if interrupt.signal and not forwarded:
                    process.send_signal(signal.SIGINT)
                    forwarded = True
                try:
                    output, errors = process.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                return subprocess.CompletedProcess(command, process.returncode, output, errors)
        except BaseException:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
