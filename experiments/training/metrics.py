"""Metrics of training steps: fetched in groups, checked, logged and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.base import logs
from experiments.objectives.protocol import Objective


class StepMetrics:
    """Metrics of the steps since the last call of `write`, and the training time of all steps.

    Metrics stay on the device until then, so that it does not wait for the host.

    Attributes:
      timed: number of the measured steps, their seconds and their processor time, which
        checkpoints store.
    """

    def __init__(
        self,
        objective: Objective,
        log: logs.RunLog | logs.NoLog,
        progress: logs.Progress,
        timed: dict[str, float],
        diverged: Callable[[str, float, int], Exception],
    ) -> None:
        """Start the clock; `diverged(name, value, step)` is the error for non-finite numbers."""
        self.timed = dict(timed)
        self._objective, self._log, self._progress = objective, log, progress
        self._tokens_per_step = math.prod(objective.batch_shape)
        self._diverged = diverged
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last call of `write`."""
        self._clock = time.perf_counter()
        self._cpu_clock = time.process_time()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Add the metrics of a step, which are still on the device."""
        self._pending.append((step, metrics))

    def write(
        self, *, timed: bool = True, solver: Callable[[], dict[str, int]] | None = None
    ) -> None:
        """Fetch, check and write the metrics of the steps since the last call.

        Args:
          timed: whether the time of these steps counts.

          solver: returns numbers to add to the last row. With it, show the mean on the terminal.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        seconds = time.perf_counter() - self._clock
        cpu_seconds = time.process_time() - self._cpu_clock
        rows: list[dict[str, Any]] = []
        for (step, _), metrics in zip(pending, fetched, strict=True):
            row = {"step": step} | {name: float(value) for name, value in metrics.items()}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(row[name]):
                    self._log.write(rows)
                    raise self._diverged(name.replace("_", " "), row[name], step)
            rows.append(row | self._objective.log(row["loss"]))
        last = rows[-1]
        if solver is not None:
            last |= solver()
        if timed:
            self.timed["steps"] += len(rows)
            self.timed["seconds"] += seconds
            self.timed["cpu_seconds"] += cpu_seconds
            last["tokens_per_second"] = speed = len(rows) * self._tokens_per_step / seconds
            if solver is not None:
                mean = sum(row["loss"] for row in rows) / len(rows)
                shown = {"loss": mean, **self._objective.log(mean)}
                self._progress.show(last["step"], shown, speed)
        self._log.write(rows)
        self._log.board(
            last["step"], {f"train/{name}": x for name, x in last.items() if name != "step"}
        )
        self.restart_clock()

    def timing(self, step: int) -> dict[str, float]:
        """Return the tokens of all steps, the training seconds and the tokens per second.

        Tokens per second of processor time depend less on other programs. They count the time of
        all threads of this process. The numbers include the steps before a resume and exclude
        evaluation. The first step after each start compiles, so it counts with the mean time of the
        other steps. Without a measured step, the result has only `tokens`.
        """
        tokens = step * self._tokens_per_step
        if not self.timed["seconds"]:
            return {"tokens": tokens}
        measured = self.timed["steps"] * self._tokens_per_step
        speed = measured / self.timed["seconds"]
        return {
            "tokens": tokens,
            "train_seconds": tokens / speed,
            "tokens_per_second": speed,
            "tokens_per_cpu_second": measured / self.timed["cpu_seconds"],
        }
