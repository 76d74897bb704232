"""The training loop: step, log, evaluate, save, resume, stop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import seqjax
from experiments.base import build, devices, logs
from experiments.base.errors import DivergedError, UserError, check_positive
from experiments.data import pipeline
from experiments.objectives import language, protocol
from experiments.training import checkpoints, newton_report, optimizer
from experiments.training.interrupt import Interrupt
from seqjax import sharding

TrainStep = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


def make_train_step(
    model: Any,
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    plan: sharding.Shardings | None = None,
    protocol: Any = language,
) -> TrainStep:
    """Returns `train_step(state, batch, step) -> (state, metrics)`, jitted; it consumes `state`.

    With a `plan` it runs on that mesh, time split over its axis `sequence`. What is minimised is
    the `loss` of the `objective`, of batches as its `prepare` makes them.
    """
    mesh = None if plan is None else plan.mesh
    model = sharding.constrain_activations(model, mesh)

    def split_loss(params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        return protocol.loss(model, params, batch, sequence_axis)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        batch = protocol.prepare(batch)
        in_time = jax.tree.map(lambda x: P(None, "sequence") if x.ndim > 1 else P(), batch)
        return sharding.split_time(split_loss, mesh, in_specs=(P(), in_time), out_specs=P())(
            params, batch
        )

    out = None
    if plan is not None:
        out = ({"params": plan.params, "optimizer": plan.optimizer}, plan.replicated)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out)
    def train_step(state: Any, batch: Any, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, optimizer_state = transform.update(gradients, state["optimizer"], state["params"])
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(step)),
        }
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, metrics

    return train_step


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree of arrays is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class Run:
    """A training run in a workdir, restored from its newest checkpoint where there is one."""

    def __init__(self, config: ConfigDict, workdir: Path) -> None:
        _check(config)
        self.config = config
        self.workdir = workdir
        self.objective = protocol.make(config)
        self.model = self.objective.model
        schedule = optimizer.make_schedule(config.optimizer, config.steps)
        transform = optimizer.make_optimizer(
            config.optimizer, config.steps, self.model.param_roles()
        )

        def init(key: jax.Array) -> Any:
            params = self.model.init(key)
            return {"params": params, "optimizer": transform.init(params)}

        shape = self.objective.batch_shape
        self._devices = devices.Devices(
            config.mesh, self.model, shape, init, config.get("mesh_axis_types", "auto")
        )
        self._train_step = make_train_step(
            self.model, transform, schedule, self._devices.plan, self.objective
        )
        self._solver_report = newton_report.make_report(self.model)
        self.evaluate = self.objective.make_evaluate(self._devices)
        self.state = self._devices.make_state(config.seed)
        self.step = 0
        self._batches = self.objective.batches(self._devices.rows(shape[0]))
        self._best = math.inf
        self._score: float | None = None  # of these parameters, where they have been evaluated
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._timed = {"steps": 0, "seconds": 0.0}
        self._checkpoints = checkpoints.Checkpoints(workdir, config.keep)
        with contextlib.ExitStack() as stack:
            # Else the threads of checkpoints report the same error once more at exit.
            stack.callback(self._checkpoints.close)
            self._restore()
            self._log = logs.RunLog(workdir, self.step) if devices.is_main() else logs.NoLog()
            stack.pop_all()
        self._saved = self.step

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._log.close()
        finally:
            self._checkpoints.close()

    def _restore(self) -> None:
        step = self._checkpoints.latest_step()
        if step is None:
            return
        meta = self._checkpoints.meta(step)
        checkpoints.check_same_run(self.workdir, meta, self.config, self.objective.fingerprint)
        if step > self.config.steps:
            raise UserError(
                f"{self.workdir} is at step {step} already: give --config.steps={step} or more, "
                "or another --workdir"
            )
        self.state = self._checkpoints.restore(step, self.state)
        pipeline.resume(self._batches, meta["data"])
        self._best = math.inf if meta["best"] is None else meta["best"]
        self._score = meta.get("score")
        self._timed = meta.get("timed", self._timed)
        self.step = step

    def describe(self) -> str:
        """A line on what is about to happen."""
        config, count = self.config, sum(map(np.size, jax.tree.leaves(self.state["params"])))
        start = f"resumed at step {self.step} of" if self.step else "training for"
        if self.good_enough():
            start = f"as good as config.stop_at={config.stop_at:g} at step {self.step} of"
        return (
            f"{config.name}: {count:,} parameters, {start} {config.steps} steps of "
            f"{' x '.join(map(str, self.objective.batch_shape))} {self.objective.unit} on "
            f"{self.objective.name} in {self.workdir}"
            + (f" on {jax.device_count()} devices, {config.mesh}" if config.mesh else "")
        )

    def timing(self) -> dict[str, float]:
        """Return the tokens of all steps, the seconds they took and the tokens per second.

        A resumed run counts the steps before the resume too. Evaluation is left out. The first step
        after each start compiles, so it counts with the mean time of the other steps. Without a
        measured step only `tokens` is returned.
        """
        each = math.prod(self.objective.batch_shape)
        tokens = self.step * each
        if not self._timed["seconds"]:
            return {"tokens": tokens}
        speed = self._timed["steps"] * each / self._timed["seconds"]
        return {"tokens": tokens, "train_seconds": tokens / speed, "tokens_per_second": speed}

    def loop(self) -> int:
        """Trains to the last step, or until it is good enough.

        Returns 0, or the exit code of the signal that stopped it.
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
                self._batch = self._devices.place(next(self._batches))
                self.state, metrics = self._train_step(self.state, self._batch, np.int32(self.step))
                self.step += 1
                self._score = None
                self._pending.append((self.step, metrics))
                self._progress.step()
                last = self.step == config.steps
                # Numbers are fetched rarely, so that the device never waits for the host.
                if self.step == first or self.step % config.log_every == 0:
                    self._drain(timed=self.step != first)
                best = False
                if self.step % config.eval_every == 0 or last:
                    best = self._evaluate()
                    last = last or self.good_enough()
                stop = self._asked_to_stop(interrupt, last)
                if stop:
                    self._progress.note(f"step {self.step}: saving a checkpoint")
                if best or last or stop or self.step % config.save_every == 0:
                    self._save(best)
                if stop:
                    break
            self._progress.close()
            self._checkpoints.wait()
            return interrupt.exit_code if stop else 0

    def good_enough(self) -> bool:
        """Whether these parameters were evaluated and are as good as `config.stop_at`."""
        wanted = self.config.stop_at
        if not wanted or self._score is None:
            return False
        return self._score <= (wanted if self.objective.lower_is_better else -wanted)

    def _asked_to_stop(self, interrupt: Interrupt, last: bool) -> bool:
        """Whether a signal has arrived; several processes ask each other now and then."""
        if jax.process_count() > 1:
            if self.step % self.config.log_every and not last:
                return False
            interrupt.signal = devices.agree(interrupt.signal or 0) or None
        return interrupt.signal is not None

    def _drain(self, timed: bool = True) -> None:
        """Fetches the numbers of the steps since the last time, checks and writes them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        seconds = time.perf_counter() - self._clock
        rows: list[dict[str, Any]] = []
        for (step, _), metrics in zip(pending, fetched, strict=True):
            row = {"step": step} | {name: float(value) for name, value in metrics.items()}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(row[name]):
                    self._log.write(rows)
                    self._diverged(name.replace("_", " "), row[name], step)
            rows.append(row | self.objective.log(row["loss"]))
        if self.step % self.config.log_every == 0:
            rows[-1] |= self._solving()
        if timed:
            # The first step compiles and says nothing about speed.
            self._timed["steps"] += len(rows)
            self._timed["seconds"] += seconds
            rows[-1]["tokens_per_second"] = (
                len(rows) * math.prod(self.objective.batch_shape) / seconds
            )
            if self.step % self.config.log_every == 0:
                mean = sum(row["loss"] for row in rows) / len(rows)
                values = {"loss": mean, **self.objective.log(mean)}
                self._progress.show(self.step, values, rows[-1]["tokens_per_second"])
        self._log.write(rows)
        self._log.board(
            self.step, {f"train/{name}": x for name, x in rows[-1].items() if name != "step"}
        )
        self._clock = time.perf_counter()

    def _solving(self) -> dict[str, int]:
        """How Newton fares on the last batch with the parameters that it led to."""
        batch = self._batch
        if self._solver_report is None or "segment_ids" not in batch:
            return {}
        numbers = self._solver_report(
            self.state["params"],
            batch["inputs"].astype(jnp.int32),
            seqjax.segment_starts(batch["segment_ids"]),
        )
        return {name: int(value) for name, value in jax.device_get(numbers).items()}

    def _evaluate(self) -> bool:
        """Evaluates on what is held out; returns whether the result is the best so far."""
        self._drain()
        row = self.evaluate(self.state["params"], False)
        value = row[self.objective.metric]
        if not math.isfinite(value):
            self._diverged(self.objective.metric.replace("_", " "), value, self.step)
        self._log.write([{"step": self.step} | row])
        self._log.board(
            self.step, {f"heldout/{name.removeprefix('heldout_')}": x for name, x in row.items()}
        )
        self._progress.note(f"step {self.step}: {self.objective.describe(row)}")
        self._clock = time.perf_counter()
        self._score = value if self.objective.lower_is_better else -value
        better = self._score < self._best
        self._best = min(self._score, self._best)
        if self.good_enough():
            self._progress.note(f"that is as good as config.stop_at={self.config.stop_at:g}: done")
        return better

    def _save(self, best: bool) -> None:
        self._drain()
        # A finite loss says nothing about the parameters that the step left behind.
        if not all_finite(self.state["params"]):
            self._diverged("parameters", math.nan, self.step)
        meta = {
            "config": build.to_json(self.config),
            "data": devices.gather_json(self._batches.get_state()),
            "fingerprint": self.objective.fingerprint,
            "best": self._best if math.isfinite(self._best) else None,
            "score": self._score,
            "timed": dict(self._timed),  # a copy: checkpoints are written later
        }
        self._checkpoints.save(self.step, self.state, meta, best=best)
        self._saved = self.step
        self._clock = time.perf_counter()

    def _diverged(self, what: str, value: float, step: int) -> None:
        self._progress.close()
        kept = (
            f"the checkpoint of step {self._saved} in {self.workdir} is kept"
            if self._saved
            else "no checkpoint was saved yet"
        )
        rate = self.config.optimizer.learning_rate
        raise DivergedError(
            f"the {what} became {value} at step {step} and training stopped; {kept}: start again "
            f"with a smaller --config.optimizer.learning_rate (now {rate:g})"
        )


def _check(config: ConfigDict) -> None:
    check_positive(config, "steps", "log_every", "eval_every", "save_every", "keep")
    check_positive(config.data, "batch_size")
    if config.stop_at < 0:
        raise UserError(f"the config field stop_at={config.stop_at} must not be negative")
