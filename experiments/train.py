"""Trains a model on a text or a task; start it again and it goes on where it was.

python -m experiments.train --config=experiments/configs/lm.py:gated_deltanet
python -m experiments.train --config=experiments/configs/state_tracking.py:parity,gru
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.base import cli, devices, logs, plots
from experiments.base.errors import UserError
from experiments.objectives import sampling
from experiments.training.loop import Run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags of this script."""
    cli.define_config(values, argv)
    devices.define_flags(values)
    flags.DEFINE_string(
        "workdir", "", "Folder of the run; by default runs/NAME.", flag_values=values
    )


def main(values: Any) -> int:
    """Trains the configuration given by flags."""
    config = cli.require_config(values)
    devices.initialize(values)
    return train(config, Path(values.workdir or default_workdir(config)))["exit_code"]


def default_workdir(config: ConfigDict) -> str:
    """runs/NAME, with the name of the text where it is not the default one."""
    data = config.get("task", config.data)
    parts = [config.name, data.get("tfds", "").replace("/", "-").replace(":", "-")]
    if data.get("path", ""):
        parts.append(Path(data.path).expanduser().resolve().stem)
    return "runs/" + "-".join(part for part in parts if part)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates and samples; returns what it wrote to summary.json."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {workdir}: {error.strerror}") from error
    with Run(config, workdir) as run:
        say(run.describe())
        stopped_by = run.loop()
        if stopped_by:
            save_curves(run)
            say(
                f"stopped at step {run.step}; saved in {workdir}: "
                "start the same command again to go on"
            )
            return {"exit_code": stopped_by, "step": run.step}
        return finish(run)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if devices.is_main():
        print(text, flush=True)


def save_curves(run: Run, final: dict[str, Any] | None = None) -> None:
    """Draw what the run has logged so far, and the result of its last evaluation."""
    if not devices.is_main():
        return
    rows = logs.read_rows(run.workdir)
    if any("loss" in row for row in rows):
        path = run.workdir / "curves.png"
        plots.save_curves(path, rows, run.config.name, run.objective, final)


def finish(run: Run) -> dict[str, Any]:
    """The final held-out evaluation, a sample, and the summary."""
    config, workdir = run.config, run.workdir
    result = run.evaluate(run.state["params"], True)
    say(run.objective.describe(result))
    result |= {"exit_code": 0, "step": run.step, **run.timing()}
    save_curves(run, result)
    files = "metrics.jsonl, curves.png, checkpoints, best"
    if "sample" in config and jax.process_count() == 1:
        save_sample(run)
        files += ", sample.txt"
    elif "sample" in config:
        say(f"no sample from several processes: python -m experiments.generate --workdir={workdir}")
    if devices.is_main():
        (workdir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    say(f"in {workdir}: {files}")
    return result


def save_sample(run: Run) -> None:
    """Draws a sample from the model, prints it and writes it to sample.txt."""
    config, workdir = run.config, run.workdir
    sample = config.sample
    prompt = sampling.encode(sample.prompt)
    stream = sampling.make_sampler(run.model)(
        run.state["params"],
        prompt,
        sample.num_bytes,
        config.seed,
        sample.temperature,
        sample.top_p,
    )
    text = "".join(sampling.decode(itertools.chain(prompt, stream)))
    (workdir / "sample.txt").write_text(text, encoding="utf-8")
    shown = sampling.printable(text, sys.stdout)
    print(f"--- sample ({sample.num_bytes} bytes) ---\n{shown}\n---", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
