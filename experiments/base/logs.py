"""Output of a training run: metrics.jsonl, TensorBoard files and a progress bar."""

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
    """Return the rows of a run's metrics file, without a last line that a kill cut short."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # Text after the last line break is an unfinished row.
    return [json.loads(line) for line in lines[:-1]]


class RunLog:
    """Log in metrics.jsonl and TensorBoard; a resume drops rows of steps that will be repeated."""

    def __init__(self, workdir: Path, step: int) -> None:
        path = workdir / METRICS_FILE
        earlier_rows = [row for row in read_rows(workdir) if row["step"] <= step]
        # An atomic replacement, so that a kill loses nothing.
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in earlier_rows))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of numbers, each with a `step`, and flush them."""
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()

    def board(self, step: int, values: dict[str, float]) -> None:
        """Add scalars to TensorBoard."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close both files."""
        try:
            self._file.close()
        finally:
            self._board.close()


class NoLog:
    """Log of every process except the first: writes nothing."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Ignore the rows."""

    def board(self, step: int, values: dict[str, float]) -> None:
        """Ignore the values."""

    def close(self) -> None:
        """Do nothing."""


class Progress:
    """Progress bar on a terminal, one line per log interval elsewhere; no output if quiet."""

    def __init__(self, start: int, steps: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._steps = steps
        self._bar = tqdm.tqdm(
            total=steps, initial=start, unit="step", disable=not self._terminal, dynamic_ncols=True
        )

    def step(self) -> None:
        """Advance the bar by one step."""
        self._bar.update(1)

    def show(self, step: int, numbers: dict[str, float], tokens_per_second: float) -> None:
        """Show the mean numbers of the last steps."""
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
        """Print a line above the bar."""
        if self._quiet:
            return
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        self._bar.close()
