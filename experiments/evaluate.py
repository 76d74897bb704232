"""Bits per byte of a trained model on held-out text, or its accuracy on a task.

    python -m experiments.evaluate --workdir=runs/lm-gated_deltanet
    python -m experiments.evaluate --workdir=runs/lm-gated_deltanet --which=best --path=book.txt

The run's configuration applies; `python -m experiments.train --help` lists its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.base import cli
from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError
from experiments.data import corpus as corpora
from experiments.data import pipeline
from experiments.objectives import heldout, language, protocol
from experiments.training import checkpoints


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best"], "Which checkpoint to use.", flag_values=values
    )
    flags.DEFINE_string(
        "path", "", "File to evaluate on instead of the run's held-out text.", flag_values=values
    )
    flags.DEFINE_integer(
        "num_bytes",
        0,
        "Largest number of bytes to evaluate on; 0: as in the run.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Evaluate the run that the flags select."""
    evaluate(values.workdir, values.which, values.path, values.num_bytes)
    return 0


def evaluate(
    workdir: str, which: str = "latest", path: str = "", num_bytes: int = 0
) -> dict[str, Any]:
    """Evaluate a checkpoint of a workdir; print and return the result."""
    model, params, config, step = checkpoints.load_for_inference(workdir, which)
    if "task" in config:
        return evaluate_task(workdir, which, path, params, config) | {"step": step}
    limit = num_bytes or config.eval.final_bytes
    if limit < 1:
        raise UserError(f"--num_bytes={num_bytes}: must be positive")
    if path:
        name, number, text = path, "bits per byte", [read_file(path)]
    else:
        corpus = pipeline.load_corpus(config.data)
        name, number = f"held-out part of {corpus.name}", "held-out bits per byte"
        text = list(corpus.heldout)
    documents = corpora.take_bytes(text, limit)
    measure = heldout.make_evaluate(model, lanes=config.eval.lanes, length=config.data.length)
    result = heldout.report(measure(params, documents), documents, sum(map(len, text)))
    result |= {"step": step}
    print(f"{workdir}, {which} checkpoint (step {step}), {name}")
    print(heldout.format_report(result, number))
    return result


def evaluate_task(
    workdir: str, which: str, path: str, params: Any, config: ConfigDict
) -> dict[str, Any]:
    """Evaluate on the test sequences of the run's task; print and return the result."""
    if path:
        language.require_text(config, "--path")
    task = protocol.make(config)
    result = task.make_evaluate(DeviceMesh(""))(params, True)
    print(f"{workdir}, {which} checkpoint, {task.name}\n{task.describe(result)}")
    return result


def read_file(path: str) -> bytes:
    """Return the bytes of the file `path`."""
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --path={path}: {error.strerror}") from error
    if not text:
        raise UserError(f"--path={path} is empty: give a file with text in it")
    return text


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
