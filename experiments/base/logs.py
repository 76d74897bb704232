"""Output of a run while it trains: metrics.jsonl, TensorBoard files and a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tensorboardX
import tqdm

METRICS_FILE = "metrics.jsonl"


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file; a last line cut short by a kill is left out."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # What follows the last line break was never finished.
    return [json.loads(line) for line in lines[:-1]]


class RunLog:
    """Appends rows to metrics.jsonl and TensorBoard; on resume forgets the steps taken again."""

    def __init__(self, workdir: Path, step: int) -> None:
        path = workdir / METRICS_FILE
        earlier_rows = [row for row in read_rows(workdir) if row["step"] <= step]
        # Replaced in one go, so that a kill in between loses nothing.
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in earlier_rows))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows of numbers, each with its `step`, and puts them on disk."""
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()

    def board(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars to TensorBoard."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both files."""
        try:
            self._file.close()
        finally:
            self._board.close()


class NoLog:
    """Log of every process but the first: it writes nothing."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes nothing."""

    def board(self, step: int, values: dict[str, float]) -> None:
        """Adds nothing."""

    def close(self) -> None:
        """Closes nothing."""


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere; nothing if quiet."""

    def __init__(self, start: int, steps: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._steps = steps
        self._bar = tqdm.tqdm(
            total=steps, initial=start, unit="step", disable=not self._terminal, dynamic_ncols=True
        )

    def step(self) -> None:
        """Counts one step."""
        self._bar.update(1)

    def show(self, step: int, numbers: dict[str, float], tokens_per_second: float) -> None:
        """Shows the means of the last steps."""
        if self._quiet:
            return
        values = {name.replace("_per_", "/"): f"{x:.3f}" for name, x in numbers.items()}
        values["tokens/s"] = f"{tokens_per_second:,.0f}"
        if self._terminal:
            self._bar.set_postfix(values)
        else:
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def note(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._quiet:
            return
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
