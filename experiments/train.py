"""Training of a model on a text or a task; the same command again resumes a stopped run.

python -m experiments.train --config=experiments/configs/lm.py:gated_deltanet
python -m experiments.train --config=experiments/configs/state_tracking.py:parity,gru

`--print_config` prints the configuration with all overrides and exits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import seqjax
from experiments.base import allocator, build, cli, devices, logs, plots, usage
from experiments.base.errors import DivergedError, UserError, check_positive
from experiments.control import run as control
from experiments.data import pipeline
from experiments.objectives import protocol, sampling
from experiments.training import checkpoints, newton_report, optimizer
from experiments.training.interrupt import Interrupt
from experiments.training.metrics import StepMetrics
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
    data = config.get("task", config.get("data", {}))
    names = [config.name, data.get("tfds", "").replace("/", "-").replace(":", "-")]
    if data.get("path", ""):
        names.append(Path(data.path).expanduser().resolve().stem)
    return "runs/" + "-".join(name for name in names if name)


def train(
    config: ConfigDict, workdir: Path, finish: Callable[[Any, Any], None] | None = None
) -> dict[str, Any]:
    """Train, evaluate and sample; return the content of summary.json.

    After a signal, save a checkpoint and return the exit code and the step. At the end of a
    complete run, call `finish(objective, params)` with the trained parameters. A configuration with
    a game runs PPO, see `experiments.control`.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {workdir}: {error.strerror}") from error
    if "game" in config:
        return control.train(config, workdir)
    check_positive(config, "steps", "log_every", "eval_every", "save_every", "keep")
    check_positive(config.data, "batch_size")
    if config.stop_at < 0:
        raise UserError(f"the config field stop_at={config.stop_at} must not be negative")

    # The model, its data, its optimizer and its training step.
    objective = protocol.make(config)
    model, shape = objective.model, objective.batch_shape
    roles = objective.trained.param_roles()
    transform = optimizer.make_optimizer(config.optimizer, config.steps, roles)
    schedule = optimizer.make_schedule(config.optimizer, config.steps)
    init = make_init(objective.trained, transform)
    axis_types = config.get("mesh_axis_types", "auto")
    mesh = devices.DeviceMesh(config.mesh, objective.trained, shape, init, axis_types)
    train_step = make_train_step(objective, transform, schedule, mesh.shardings)
    evaluate = objective.make_evaluate(mesh)
    solver_report = newton_report.make_report(model)
    batches = objective.batches(mesh.rows(shape[0]))
    state, step = mesh.make_state(config.seed, objective.load(mesh)), 0
    frozen = objective.frozen
    score: float | None = None  # of the current parameters, if evaluated; smaller is better
    best_score, timed = math.inf, {"steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    target = config.stop_at if objective.lower_is_better else -config.stop_at

    def good_enough() -> bool:
        """Return whether the current parameters were evaluated and reach `config.stop_at`."""
        return bool(config.stop_at) and score is not None and score <= target

    def diverged(name: str, value: float, step: int) -> DivergedError:
        saved = (
            f"the checkpoint of step {saved_step} in {workdir} is kept"
            if saved_step
            else "no checkpoint was saved yet"
        )
        return DivergedError(
            f"the {name} became {value} at step {step} and training stopped; {saved}: start again "
            "with a smaller --config.optimizer.learning_rate "
            f"(now {config.optimizer.learning_rate:g})"
        )

    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(
            contextlib.closing(checkpoints.Checkpoints(workdir, config.keep))
        )
        restored = saver.resume(config, objective.fingerprint, state)
        if restored is not None:
            step, state, meta = restored
            pipeline.resume(batches, meta["data"])
            best_score = math.inf if meta["best"] is None else meta["best"]
            score = meta.get("score")
            # Earlier versions did not store the processor time.
            timed = saved if (saved := meta.get("timed", {})).keys() == timed.keys() else timed
        saved_step = step
        log = stack.enter_context(
            contextlib.closing(logs.RunLog(workdir, step) if devices.is_main() else logs.NoLog())
        )
        start = f"resumed at step {step} of" if step else "training for"
        if good_enough():
            start = f"reached config.stop_at={config.stop_at:g} at step {step} of"
        say(
            f"{config.name}: {count_params(state['params']):,} parameters, "
            + (f"{count_params(frozen):,} frozen, " if frozen is not None else "")
            + f"{start} {config.steps} steps of {' x '.join(map(str, shape))} {objective.unit} on "
            f"{objective.name} in {workdir}"
            + (f" on {jax.device_count()} devices, {config.mesh}" if config.mesh else "")
        )
        progress = stack.enter_context(
            contextlib.closing(logs.Progress(step, config.steps, quiet=not devices.is_main()))
        )
        metrics = StepMetrics(objective, log, progress, timed, diverged)
        first, stop = step + 1, False
        with Interrupt(
            f"stopping after this step and saving a checkpoint in {workdir}; "
            "a second signal stops at once, without saving"
        ) as interrupt:
            while step < config.steps and not good_enough() and not stop:
                batch = mesh.put(next(batches))
                state, step_metrics = train_step(state, batch, np.int32(step), frozen)
                step, score = step + 1, None
                metrics.add(step, step_metrics)
                progress.step()
                best, last = False, step == config.steps

                if step % config.log_every == 0:
                    solver = functools.partial(solve_numbers, solver_report, state, batch)
                    metrics.write(timed=step != first, solver=solver)
                elif step == first:
                    metrics.write(timed=False)  # this step compiles

                if step % config.eval_every == 0 or last:
                    metrics.write()
                    result = evaluate(state["params"], False)
                    value = result[objective.metric]
                    if not math.isfinite(value):
                        raise diverged(objective.metric.replace("_", " "), value, step)
                    log.write([{"step": step} | result])
                    shown = {name.removeprefix("heldout_"): x for name, x in result.items()}
                    log.board(step, {f"heldout/{name}": x for name, x in shown.items()})
                    progress.note(f"step {step}: {objective.describe(result)}")
                    score = value if objective.lower_is_better else -value
                    best, best_score = score < best_score, min(score, best_score)
                    if good_enough():
                        progress.note(f"reached config.stop_at={config.stop_at:g}: done")
                    last = last or good_enough()
                    metrics.restart_clock()

                if jax.process_count() == 1:
                    stop = interrupt.signal is not None
                elif step % config.log_every == 0 or last:
                    # Processes agree when they log: a signal to any of them stops all.
                    interrupt.signal = devices.agree(interrupt.signal or 0) or None
                    stop = interrupt.signal is not None
                if stop:
                    progress.note(f"step {step}: saving a checkpoint")

                if best or last or stop or step % config.save_every == 0:
                    metrics.write()
                    # The loss checked above belongs to the parameters before the step.
                    if not all_finite(state["params"]):
                        raise diverged("parameters", math.nan, step)
                    meta = {
                        "config": build.to_json(config),
                        "data": devices.gather_json(batches.get_state()),
                        "fingerprint": objective.fingerprint,
                        "best": best_score if math.isfinite(best_score) else None,
                        "score": score,
                        "timed": dict(metrics.timed),  # a copy: checkpoints are written later
                    }
                    saver.save(step, state, meta, best=best)
                    saved_step = step
                    metrics.restart_clock()
            progress.close()
            saver.wait()
        if stop:
            save_curves(config, objective, workdir)
            say(
                f"stopped at step {step}; saved in {workdir}: "
                "start the same command again to resume"
            )
            return {"exit_code": interrupt.exit_code, "step": step}

        # The final evaluation, the curves, a sample and summary.json.
        result = evaluate(state["params"], True)
        say(objective.describe(result))
        result |= {"exit_code": 0, "step": step, **metrics.timing(step)}
        result["parameters"] = count_params(state["params"])
        save_curves(config, objective, workdir, result)
        files = "metrics.jsonl, curves.png, checkpoints, best"
        wanted = "sample" in config and config.sample.num_bytes != 0
        if wanted and jax.process_count() == 1:
            save_sample(config, model, state["params"], workdir)
            files += ", sample.txt"
        elif wanted:
            say(
                "no sample from several processes: "
                f"python -m experiments.generate --workdir={workdir}"
            )
        if devices.is_main():
            (workdir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        if finish is not None:
            finish(objective, state["params"])
        say(f"in {workdir}: {files}")
        return result


def count_params(params: Any) -> int:
    """Return the number of parameters in a tree."""
    return sum(map(np.size, jax.tree.leaves(params)))


def say(text: str) -> None:
    """Print a line in the main process."""
    if devices.is_main():
        print(text, flush=True)


def solve_numbers(
    report: newton_report.Report | None, state: Any, batch: dict[str, Any]
) -> dict[str, int]:
    """Return Newton's numbers on a batch, with the parameters after its step."""
    if report is None or "segment_ids" not in batch or batch["inputs"].ndim > 2:
        return {}
    numbers = report(
        state["params"],
        batch["inputs"].astype(jnp.int32),
        seqjax.segment_starts(batch["segment_ids"]),
    )
    return {name: int(value) for name, value in jax.device_get(numbers).items()}


def save_curves(
    config: ConfigDict, objective: Any, workdir: Path, final: dict[str, Any] | None = None
) -> None:
    """Plot the rows of the log and the result of the final evaluation."""
    if not devices.is_main():
        return
    rows = logs.read_rows(workdir)
    if any("loss" in row for row in rows):
        plots.save_curves(workdir / "curves.png", rows, config.name, objective, final)


def save_sample(config: ConfigDict, model: Any, params: Any, workdir: Path) -> None:
    """Draw a sample from the model, print it and write it to sample.txt."""
    sample = config.sample
    prompt = sampling.encode(sample.prompt)
    settings = sampling.Settings(
        sample.num_bytes, sample.temperature, sample.top_p, seed=config.seed
    )
    stream = sampling.stream(model, params, prompt, settings)
    text = "".join(sampling.decode(itertools.chain(prompt, stream)))
    (workdir / "sample.txt").write_text(text, encoding="utf-8")
    shown = sampling.printable(text, sys.stdout)
    print(f"--- sample ({sample.num_bytes} bytes) ---\n{shown}\n---", flush=True)


if __name__ == "__main__":
    allocator.keep_memory()  # before JAX starts its backend
    sys.exit(cli.run(define_flags, main))
