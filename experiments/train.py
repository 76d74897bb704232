"""Training of a model on a text or a task; the same command again resumes a stopped run.

python -m experiments.train --config=experiments/configs/lm.py:gated_deltanet
python -m experiments.train --config=experiments/configs/state_tracking.py:parity,gru

`--print_config` prints the configuration with all overrides and exits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import seqjax
from experiments.base import build, cli, devices, logs, plots, usage
from experiments.base.errors import DivergedError, UserError, check_positive
from experiments.data import pipeline
from experiments.objectives import protocol, sampling
from experiments.training import checkpoints, newton_report, optimizer
from experiments.training.interrupt import Interrupt
from experiments.training.step import all_finite, make_init, make_train_step


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    cli.define_config(values, argv)
    devices.define_flags(values)
    flags.DEFINE_string(
        "workdir", "", "Folder of the run; by default runs/NAME.", flag_values=values
    )
    flags.DEFINE_boolean(
        "print_config",
        False,
        "Print all fields of the configuration with values and comments, then exit.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Train the configuration that the flags select."""
    config = cli.require_config(values)
    if values.print_config:
        print(usage.resolved(config))
        return 0
    devices.initialize(values)
    return train(config, Path(values.workdir or default_workdir(config)))["exit_code"]


def default_workdir(config: ConfigDict) -> str:
    """Return runs/NAME, with the name of the text unless it is the default text."""
    data = config.get("task", config.data)
    names = [config.name, data.get("tfds", "").replace("/", "-").replace(":", "-")]
    if data.get("path", ""):
        names.append(Path(data.path).expanduser().resolve().stem)
    return "runs/" + "-".join(name for name in names if name)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train, evaluate and sample; return the content of summary.json."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {workdir}: {error.strerror}") from error
    with Run(config, workdir) as run:
        say(run.describe())
        stopped_by = run.loop()
        if stopped_by:
            run.save_curves()
            say(
                f"stopped at step {run.step}; saved in {workdir}: "
                "start the same command again to resume"
            )
            return {"exit_code": stopped_by, "step": run.step}
        return run.finish()


def say(text: str) -> None:
    """Print a line in the main process."""
    if devices.is_main():
        print(text, flush=True)


class Run:
    """A training run in a workdir: build, restore, loop, log, evaluate, save, finish."""

    def __init__(self, config: ConfigDict, workdir: Path) -> None:
        """Build the model, its data and its training step, and restore the newest checkpoint."""
        check_positive(config, "steps", "log_every", "eval_every", "save_every", "keep")
        check_positive(config.data, "batch_size")
        if config.stop_at < 0:
            raise UserError(f"the config field stop_at={config.stop_at} must not be negative")
        self.config, self.workdir = config, workdir
        self.objective = protocol.make(config)
        self.model = self.objective.model
        shape = self.objective.batch_shape
        self._tokens_per_step = math.prod(shape)
        roles = self.model.param_roles()
        transform = optimizer.make_optimizer(config.optimizer, config.steps, roles)
        schedule = optimizer.make_schedule(config.optimizer, config.steps)
        axis_types = config.get("mesh_axis_types", "auto")
        init = make_init(self.model, transform)
        self._mesh = devices.DeviceMesh(config.mesh, self.model, shape, init, axis_types)
        self._train_step = make_train_step(
            self.objective, transform, schedule, self._mesh.shardings
        )
        self._evaluate = self.objective.make_evaluate(self._mesh)
        self._solver_report = newton_report.make_report(self.model)
        self._batches = self.objective.batches(self._mesh.rows(shape[0]))
        self.state = self._mesh.make_state(config.seed)
        self.step = 0
        self._score: float | None = None  # score of the current parameters, if evaluated
        self._best_score = math.inf
        self._timed = {"steps": 0, "seconds": 0.0}
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []  # metrics still on the device
        self._checkpoints = checkpoints.Checkpoints(workdir, config.keep)
        with contextlib.ExitStack() as stack:
            # Otherwise the threads of checkpoints report the same error again at exit.
            stack.callback(self._checkpoints.close)
            self._restore()
            self._log = logs.RunLog(workdir, self.step) if devices.is_main() else logs.NoLog()
            stack.pop_all()
        self._saved_step = self.step

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._log.close()
        finally:
            self._checkpoints.close()

    def _restore(self) -> None:
        restored = self._checkpoints.resume(self.config, self.objective.fingerprint, self.state)
        if restored is None:
            return
        self.step, self.state, meta = restored
        pipeline.resume(self._batches, meta["data"])
        self._best_score = math.inf if meta["best"] is None else meta["best"]
        self._score = meta.get("score")
        self._timed = meta.get("timed", self._timed)

    def describe(self) -> str:
        """Return a one-line description of the run."""
        config, count = self.config, sum(map(np.size, jax.tree.leaves(self.state["params"])))
        start = f"resumed at step {self.step} of" if self.step else "training for"
        if self.good_enough():
            start = f"reached config.stop_at={config.stop_at:g} at step {self.step} of"
        return (
            f"{config.name}: {count:,} parameters, {start} {config.steps} steps of "
            f"{' x '.join(map(str, self.objective.batch_shape))} {self.objective.unit} on "
            f"{self.objective.name} in {self.workdir}"
            + (f" on {jax.device_count()} devices, {config.mesh}" if config.mesh else "")
        )

    def loop(self) -> int:
        """Train to the last step, or until the model reaches `config.stop_at`.

        Returns 0, or the exit code of the signal that stopped the loop.
        """
        config = self.config
        self._progress = logs.Progress(self.step, config.steps, quiet=not devices.is_main())
        self._clock = time.perf_counter()
        first = self.step + 1
        stop = False
        with Interrupt(
            f"stopping after this step and saving a checkpoint in {self.workdir}; "
            "a second signal stops at once, without saving"
        ) as interrupt:
            while self.step < config.steps and not self.good_enough():
                self._batch = self._mesh.put(next(self._batches))
                self.state, metrics = self._train_step(self.state, self._batch, np.int32(self.step))
                self.step += 1
                self._score = None
                self._pending.append((self.step, metrics))
                self._progress.step()
                last = self.step == config.steps
                # Metrics are fetched rarely, so that the device does not wait for the host.
                if self.step == first or self.step % config.log_every == 0:
                    # The first step compiles, so its time does not count.
                    self.write_metrics(timed=self.step != first)
                best = False
                if self.step % config.eval_every == 0 or last:
                    best = self.evaluate()
                    last = last or self.good_enough()
                stop = self._stop_requested(interrupt, last)
                if stop:
                    self._progress.note(f"step {self.step}: saving a checkpoint")
                if best or last or stop or self.step % config.save_every == 0:
                    self.save(best)
                if stop:
                    break
            self._progress.close()
            self._checkpoints.wait()
            return interrupt.exit_code if stop else 0

    def good_enough(self) -> bool:
        """Return whether the current parameters were evaluated and reach `config.stop_at`."""
        target = self.config.stop_at
        if not target or self._score is None:
            return False
        return self._score <= (target if self.objective.lower_is_better else -target)

    def _stop_requested(self, interrupt: Interrupt, last: bool) -> bool:
        """Return whether any process has received a signal; processes agree when they log."""
        if jax.process_count() > 1:
            if self.step % self.config.log_every and not last:
                return False
            interrupt.signal = devices.agree(interrupt.signal or 0) or None
        return interrupt.signal is not None

    def write_metrics(self, timed: bool = True) -> None:
        """Fetch, check and write the metrics of the steps since the last call."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        seconds = time.perf_counter() - self._clock
        logged_step = self.step % self.config.log_every == 0
        rows: list[dict[str, Any]] = []
        for (step, _), metrics in zip(pending, fetched, strict=True):
            row = {"step": step} | {name: float(value) for name, value in metrics.items()}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(row[name]):
                    self._log.write(rows)
                    self._diverged(name.replace("_", " "), row[name], step)
            rows.append(row | self.objective.log(row["loss"]))
        if logged_step:
            rows[-1] |= self._solver_metrics()
        if timed:
            self._timed["steps"] += len(rows)
            self._timed["seconds"] += seconds
            speed = len(rows) * self._tokens_per_step / seconds
            rows[-1]["tokens_per_second"] = speed
            if logged_step:
                mean = sum(row["loss"] for row in rows) / len(rows)
                self._progress.show(self.step, {"loss": mean, **self.objective.log(mean)}, speed)
        self._log.write(rows)
        self._log.board(
            self.step, {f"train/{name}": x for name, x in rows[-1].items() if name != "step"}
        )
        self._clock = time.perf_counter()

    def _solver_metrics(self) -> dict[str, int]:
        """Return Newton's numbers on the last batch, with the parameters after its step."""
        batch = self._batch
        if self._solver_report is None or "segment_ids" not in batch:
            return {}
        numbers = self._solver_report(
            self.state["params"],
            batch["inputs"].astype(jnp.int32),
            seqjax.segment_starts(batch["segment_ids"]),
        )
        return {name: int(value) for name, value in jax.device_get(numbers).items()}

    def evaluate(self) -> bool:
        """Evaluate on held-out data; return whether the result is the best so far."""
        self.write_metrics()
        metric = self.objective.metric
        result = self._evaluate(self.state["params"], False)
        value = result[metric]
        if not math.isfinite(value):
            self._diverged(metric.replace("_", " "), value, self.step)
        self._log.write([{"step": self.step} | result])
        self._log.board(
            self.step, {f"heldout/{name.removeprefix('heldout_')}": x for name, x in result.items()}
        )
        self._progress.note(f"step {self.step}: {self.objective.describe(result)}")
        self._clock = time.perf_counter()
        self._score = value if self.objective.lower_is_better else -value
        better = self._score < self._best_score
        self._best_score = min(self._score, self._best_score)
        if self.good_enough():
            self._progress.note(f"reached config.stop_at={self.config.stop_at:g}: done")
        return better

    def save(self, best: bool) -> None:
        """Save a checkpoint, and a copy of it if the evaluation is the best so far."""
        self.write_metrics()
        # The loss checked above belongs to the parameters before the step.
        if not all_finite(self.state["params"]):
            self._diverged("parameters", math.nan, self.step)
        meta = {
            "config": build.to_json(self.config),
            "data": devices.gather_json(self._batches.get_state()),
            "fingerprint": self.objective.fingerprint,
            "best": self._best_score if math.isfinite(self._best_score) else None,
            "score": self._score,
            "timed": dict(self._timed),  # a copy, because checkpoints are written later
        }
        self._checkpoints.save(self.step, self.state, meta, best=best)
        self._saved_step = self.step
        self._clock = time.perf_counter()

    def _diverged(self, name: str, value: float, step: int) -> None:
        self._progress.close()
        saved = (
            f"the checkpoint of step {self._saved_step} in {self.workdir} is kept"
            if self._saved_step
            else "no checkpoint was saved yet"
        )
        rate = self.config.optimizer.learning_rate
        raise DivergedError(
            f"the {name} became {value} at step {step} and training stopped; {saved}: start again "
            f"with a smaller --config.optimizer.learning_rate (now {rate:g})"
        )

    def timing(self) -> dict[str, float]:
        """Return the tokens of all steps, the training seconds and the tokens per second.

        The numbers include the steps before a resume and exclude evaluation. The first step after
        each start compiles, so it counts with the mean time of the other steps. Without a measured
        step, the result has only `tokens`.
        """
        tokens = self.step * self._tokens_per_step
        if not self._timed["seconds"]:
            return {"tokens": tokens}
        speed = self._timed["steps"] * self._tokens_per_step / self._timed["seconds"]
        return {"tokens": tokens, "train_seconds": tokens / speed, "tokens_per_second": speed}

    def finish(self) -> dict[str, Any]:
        """Run the final evaluation and write a sample, the curves and summary.json."""
        config, workdir = self.config, self.workdir
        result = self._evaluate(self.state["params"], True)
        say(self.objective.describe(result))
        result |= {"exit_code": 0, "step": self.step, **self.timing()}
        self.save_curves(result)
        files = "metrics.jsonl, curves.png, checkpoints, best"
        if "sample" in config and jax.process_count() == 1:
            self.save_sample()
            files += ", sample.txt"
        elif "sample" in config:
            say(
                "no sample from several processes: "
                f"python -m experiments.generate --workdir={workdir}"
            )
        if devices.is_main():
            (workdir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        say(f"in {workdir}: {files}")
        return result

    def save_curves(self, final: dict[str, Any] | None = None) -> None:
        """Plot the rows of the log and the result of the final evaluation."""
        if not devices.is_main():
            return
        rows = logs.read_rows(self.workdir)
        if any("loss" in row for row in rows):
            path = self.workdir / "curves.png"
            plots.save_curves(path, rows, self.config.name, self.objective, final)

    def save_sample(self) -> None:
        """Draw a sample from the model, print it and write it to sample.txt."""
        sample = self.config.sample
        prompt = sampling.encode(sample.prompt)
        settings = sampling.Settings(
            sample.num_bytes, sample.temperature, sample.top_p, seed=self.config.seed
        )
        stream = sampling.stream(self.model, self.state["params"], prompt, settings)
        text = "".join(sampling.decode(itertools.chain(prompt, stream)))
        (self.workdir / "sample.txt").write_text(text, encoding="utf-8")
        shown = sampling.printable(text, sys.stdout)
        print(f"--- sample ({sample.num_bytes} bytes) ---\n{shown}\n---", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
