"""The training loop: step, log, evaluate, save, resume, stop."""

from __future__ import annotations

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
from experiments import build, checkpoints, devices, heldout, logs, optimizer, solves
from experiments.data import corpus as corpora
from experiments.data import pipeline
from experiments.errors import UserError
from experiments.interrupt import Interrupt
from seqjax import sharding

TrainStep = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


def make_train_step(
    model: Any,
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    plan: sharding.Shardings | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch, step) -> (state, metrics)`, jitted; it consumes `state`.

    With a `plan` it runs on that mesh, time split over its axis `sequence`.
    """
    mesh = None if plan is None else plan.mesh
    model = sharding.place_activations(model, mesh)

    def nats(
        params: Any,
        inputs: jax.Array,
        targets: jax.Array,
        reset: jax.Array,
        sequence_axis: str | None,
    ) -> jax.Array:
        logits, _ = model.apply(params, inputs, reset=reset, sequence_axis=sequence_axis)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return loss if sequence_axis is None else jax.lax.pmean(loss, sequence_axis)

    time_split = P(None, "sequence")
    mean_nats = sharding.split_time(
        nats,
        mesh,
        in_specs=(P(), time_split, time_split, time_split),
        out_specs=P(),
    )

    def loss_of(params: Any, batch: Any) -> jax.Array:
        return mean_nats(
            params,
            batch["inputs"].astype(jnp.int32),
            batch["targets"].astype(jnp.int32),
            seqjax.segment_starts(batch["segment_ids"]),
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
        self.corpus = pipeline.load_corpus(config.data)
        self.model = build.build_model(config.model)
        schedule = optimizer.make_schedule(config.optimizer, config.steps)
        transform = optimizer.make_optimizer(
            config.optimizer, config.steps, self.model.param_roles()
        )

        def init(key: jax.Array) -> Any:
            params = self.model.init(key)
            return {"params": params, "optimizer": transform.init(params)}

        batch_shape = (config.data.batch_size, config.data.length)
        self._devices = devices.Devices(config.mesh, self.model, batch_shape, init)
        self._train_step = make_train_step(self.model, transform, schedule, self._devices.plan)
        self._solver_report = solves.make_report(self.model)
        self.evaluate = heldout.make_evaluate(
            self.model, lanes=config.eval.lanes, length=config.data.length, place=self._devices
        )
        self.state = self._devices.make_state(config.seed)
        self.step = 0
        self._batches = pipeline.train_batches(
            self.corpus.train,
            length=config.data.length,
            batch_size=config.data.batch_size,
            seed=config.seed,
            shuffle_windows=config.data.shuffle_windows,
            streams=config.data.streams,
            rows=self._devices.rows(config.data.batch_size),
        )
        self._best = math.inf
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._timed = {"steps": 0, "seconds": 0.0}
        self._checkpoints = checkpoints.Checkpoints(workdir, config.keep)
        self._restore()
        self._log = logs.RunLog(workdir, self.step) if devices.is_main() else logs.NoLog()
        self._saved = self.step

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self._log.close()
        self._checkpoints.close()

    def _restore(self) -> None:
        step = self._checkpoints.latest_step()
        if step is None:
            return
        meta = self._checkpoints.meta(step)
        checkpoints.check_same_run(self.workdir, meta, self.config, self.corpus.fingerprint)
        if step > self.config.steps:
            raise UserError(
                f"{self.workdir} is at step {step} already: give --config.steps={step} or more, "
                "or another --workdir"
            )
        self.state = self._checkpoints.restore(step, self.state)
        pipeline.resume(self._batches, meta["data"])
        self._best = math.inf if meta["best"] is None else meta["best"]
        self.step = step

    def describe(self) -> str:
        """A line on what is about to happen."""
        config, count = self.config, sum(map(np.size, jax.tree.leaves(self.state["params"])))
        start = f"resumed at step {self.step} of" if self.step else "training for"
        return (
            f"{config.name}: {count:,} parameters, {start} {config.steps} steps of "
            f"{config.data.batch_size} x {config.data.length} bytes on {self.corpus.name} "
            f"in {self.workdir}"
            + (f" on {jax.device_count()} devices, {config.mesh}" if config.mesh else "")
        )

    def heldout(self, limit: int) -> list[bytes]:
        """At most `limit` held-out bytes, the same ones in every run."""
        return corpora.take_bytes(self.corpus.heldout, limit)

    def timing(self) -> dict[str, float]:
        """Steps taken per second and bytes per second, compilation and evaluation left out."""
        seconds = max(self._timed["seconds"], 1e-9)
        data = self.config.data
        tokens = self._timed["steps"] * data.batch_size * data.length
        return {"train_seconds": self._timed["seconds"], "tokens_per_second": tokens / seconds}

    def loop(self) -> int:
        """Trains to the last step; returns 0, or the exit code of the signal that stopped it."""
        config = self.config
        evaluated = self.heldout(config.eval.bytes)
        self._progress = logs.Progress(self.step, config.steps, quiet=not devices.is_main())
        self._clock = time.perf_counter()
        first = self.step + 1
        stop = False
        with Interrupt() as interrupt:
            while self.step < config.steps:
                self._batch = self._devices.place(next(self._batches))
                self.state, metrics = self._train_step(self.state, self._batch, np.int32(self.step))
                self.step += 1
                self._pending.append((self.step, metrics))
                self._progress.step()
                last = self.step == config.steps
                # Numbers are fetched rarely, so that the device never waits for the host.
                if self.step == first or self.step % config.log_every == 0:
                    self._drain(timed=self.step != first)
                best = False
                if self.step % config.eval_every == 0 or last:
                    best = self._evaluate(evaluated)
                stop = self._asked_to_stop(interrupt)
                if best or last or stop or self.step % config.save_every == 0:
                    self._save(best)
                if stop:
                    break
            self._progress.close()
            self._checkpoints.wait()
            return interrupt.exit_code if stop else 0

    def _asked_to_stop(self, interrupt: Interrupt) -> bool:
        """Whether a signal has arrived; several processes ask each other now and then."""
        if jax.process_count() > 1:
            if self.step % self.config.log_every and self.step != self.config.steps:
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
            row["bits_per_byte"] = row["loss"] / math.log(2)
            rows.append(row)
        if self.step % self.config.log_every == 0:
            rows[-1] |= self._solving()
        if timed:
            # The first step compiles and says nothing about speed.
            self._timed["steps"] += len(rows)
            self._timed["seconds"] += seconds
            rows[-1]["tokens_per_second"] = (
                len(rows) * self.config.data.batch_size * self.config.data.length / seconds
            )
            if self.step % self.config.log_every == 0:
                mean = sum(row["loss"] for row in rows) / len(rows)
                self._progress.show(self.step, mean, rows[-1]["tokens_per_second"])
        self._log.write(rows)
        self._log.board(
            self.step, {f"train/{name}": x for name, x in rows[-1].items() if name != "step"}
        )
        self._clock = time.perf_counter()

    def _solving(self) -> dict[str, int]:
        """How Newton fares on the last batch with the parameters that it led to."""
        if self._solver_report is None:
            return {}
        batch = self._batch
        numbers = self._solver_report(
            self.state["params"],
            batch["inputs"].astype(jnp.int32),
            seqjax.segment_starts(batch["segment_ids"]),
        )
        return {name: int(value) for name, value in jax.device_get(numbers).items()}

    def _evaluate(self, documents: list[bytes]) -> bool:
        """Evaluates on held-out text; returns whether the result is the best so far."""
        self._drain()
        bits = self.evaluate(self.state["params"], documents)
        if not math.isfinite(bits):
            self._diverged("held-out loss", bits, self.step)
        size = sum(map(len, documents))
        row = {"step": self.step, "heldout_bits_per_byte": bits, "heldout_bytes": size}
        self._log.write([row])
        self._log.board(self.step, {"heldout/bits_per_byte": bits})
        self._progress.note(f"step {self.step}: held-out bits per byte {bits:.3f} ({size:,} bytes)")
        self._clock = time.perf_counter()
        better = bits < self._best
        self._best = min(bits, self._best)
        return better

    def _save(self, best: bool) -> None:
        self._drain()
        # A finite loss says nothing about the parameters that the step left behind.
        if not all_finite(self.state["params"]):
            self._diverged("parameters", math.nan, self.step)
        meta = {
            "config": build.to_json(self.config),
            "data": devices.gather_json(self._batches.get_state()),
            "fingerprint": self.corpus.fingerprint,
            "best": self._best if math.isfinite(self._best) else None,
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
        raise UserError(
            f"the {what} became {value} at step {step} and training stopped; {kept}: start again "
            f"with a smaller --config.optimizer.learning_rate (now {rate:g})"
        )


def _check(config: ConfigDict) -> None:
    for section, names in (
        (config, ("steps", "log_every", "eval_every", "save_every", "keep")),
        (config.data, ("batch_size", "length", "shuffle_windows", "streams")),
        (config.eval, ("lanes", "bytes", "final_bytes")),
    ):
        for name in names:
            if section[name] < 1:
                raise UserError(f"the config field {name}={section[name]} must be at least 1")
