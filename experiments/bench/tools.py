"""Shared tools of the benchmark suites: timing ratios, worker processes and tables."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags

ONLY = flags.DEFINE_string(
    "only",
    "",
    "Run only rows whose name starts with this; scan, newton, generate and speculate ignore it.",
)
PROCESSOR_TIME = flags.DEFINE_boolean(
    "processor_time", False, "Compare processor time; pin the process to one core."
)
CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size",
    None,
    "Steps in a chunk in the suite ops; default: those of the ops.",
    lower_bound=1,
)

SCAN_SHAPES = ((8, 2048, 512), (1, 65536, 64), (32, 1024, 256))  # B, T, D of the elementwise scan
Candidates = dict[str, Callable[..., Any]]
# Seconds that short calls are repeated for. The time of a single short call depends on the state
# of the threads at its start.
SHORTEST = 5e-3


def ratios(candidates: Candidates, reference: str, rounds: int) -> dict[str, float]:
    """Return the median over rounds of each candidate's time over the reference's time."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    calls: dict[str, int] = {}
    by_processor = flags.FLAGS.is_parsed() and PROCESSOR_TIME.value
    clock = time.process_time if by_processor else time.perf_counter
    for name, run in candidates.items():
        jax.block_until_ready(run())  # compile
        calls[name] = 1 + int(SHORTEST / seconds(run))
    for _ in range(rounds):
        for name, run in candidates.items():
            jax.block_until_ready(run())
            times[name].append(statistics.fmean(seconds(run, clock) for _ in range(calls[name])))
    return {
        name: statistics.median(t / r for t, r in zip(ts, times[reference], strict=True))
        for name, ts in times.items()
    }


def seconds(run: Callable[..., Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call; use them for comparisons within one run only."""
    start = clock()
    result = jax.block_until_ready(run())
    taken = clock() - start
    del result
    return taken


def processor_times(
    candidates: Candidates, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Return the processor times of the calls of each candidate; a round calls each one once.

    Processor time depends less on other programs than elapsed time does. It adds the time of all
    threads, so pin the process to one core (`taskset -c 0`) to leave out threads that wait. On
    accelerators, pass a `clock` of elapsed time.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        jax.block_until_ready(run())  # compile
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            jax.block_until_ready(run())
            times[name].append(clock() - start)
    return times


def cpu_seconds(
    candidates: Candidates, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return the least processor time of a call of each candidate; see `processor_times`."""
    return {name: min(found) for name, found in processor_times(candidates, rounds, clock).items()}


def run_apart(
    module: str,
    request: Any,
    folder: pathlib.Path,
    env: dict[str, str],
    *,
    may_crash: bool = False,
) -> str:
    """Run a module in a separate process and return its answer to a request; see `answer`."""
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
    )
    if done.returncode and not may_crash:
        raise RuntimeError(f"{request}: {done.stderr.strip().splitlines()[-1]}")
    return (folder / "program.txt").read_text()


def answer(respond: Callable[..., str]) -> None:
    """Call `respond` on the request in the folder `argv[1]`; runs in the worker process."""
    folder = pathlib.Path(sys.argv[1])
    (folder / "program.txt").write_text(respond(*json.loads((folder / "request.json").read_text())))


class Table:
    """A Markdown table, printed row by row; floats are printed with two decimals."""

    def __init__(self, title: str, names: list[str] | None = None) -> None:
        print(f"\n{title}\n", flush=True)
        self._given = names or []
        self._names: list[str] = []

    def row(self, label: str, values: Mapping[str, float | str]) -> None:
        """Print a row; before the first one, print the header with the names of the columns."""
        if not self._names:
            self._names = self._given or list(values)
            print("| | " + " | ".join(self._names) + " |")
            print("|---" * (len(self._names) + 1) + "|")
        cells = (
            f"{value:.2f}" if isinstance(value, float) else str(value)
            for value in (values.get(name, "") for name in self._names)
        )
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
