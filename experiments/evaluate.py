"""Bits per byte of a model on a text, perplexity of a published model, or accuracy on a task.

    python -m experiments.evaluate --workdir=runs/lm-gated_deltanet
    python -m experiments.evaluate --workdir=runs/lm-gated_deltanet --which=best --path=book.txt
    python -m experiments.evaluate --workdir=runs/lm-mamba --dynamic_evaluation
    python -m experiments.evaluate --checkpoint=path/to/mamba-130m-hf --text=book.txt

`--dynamic_evaluation` takes a gradient step after each window (arXiv 1709.07432). The run's
configuration applies; `python -m experiments.train --help` lists its fields.
"""

from __future__ import annotations

import dataclasses
import math
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
from experiments.data import finetuning, pipeline
from experiments.objectives import dynamic, heldout, language, losses, protocol, published
from experiments.training import checkpoints

CHECKPOINT_WINDOW = 512


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation on text, checked at construction.

    Attributes:
      num_bytes: largest number of bytes to read; 0 for the default.
      window: positions of a window; 0 for the default.
      lanes: number of parts of the text that are read side by side; 0 for the default.
      dynamic: whether to take a gradient step after each window.
      rate: size of these steps.
      decay: part of the way back to the first parameters in each step.
    """

    num_bytes: int = 0
    window: int = 0
    lanes: int = 0
    dynamic: bool = False
    rate: float = 0.1
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_bytes", "window", "lanes"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must be positive")
        if self.rate <= 0:
            raise UserError(f"--dynamic_rate={self.rate}: must be positive")
        if not 0 <= self.decay <= 1:
            raise UserError(f"--dynamic_decay={self.decay}: must be from 0 to 1")

    def total(self, model: Any) -> heldout.Total:
        """Return the function that reads streams and returns their log-loss."""
        if self.dynamic:
            return dynamic.make_total(model, self.rate, self.decay)
        return heldout.make_total(model)


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best"], "Which checkpoint to use.", flag_values=values
    )
    flags.DEFINE_string(
        "path", "", "File to evaluate on instead of the run's held-out text.", flag_values=values
    )
    flags.DEFINE_string(
        "checkpoint",
        "",
        "Folder of a published checkpoint, or its name on the Hugging Face hub; instead of a run.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "int8",
        False,
        "Store the projections of the published checkpoint in int8; needs the package qwix.",
        flag_values=values,
    )
    flags.DEFINE_string("text", "", "File to evaluate a checkpoint on.", flag_values=values)
    flags.DEFINE_integer(
        "num_bytes",
        0,
        "Largest number of bytes to evaluate on; 0: as in the run, or all.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "window",
        0,
        f"Bytes or tokens of a window; 0: as in the run, or {CHECKPOINT_WINDOW}.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "lanes",
        0,
        "Parts of the text that are read side by side; 0: as in the run, or 1.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "dynamic_evaluation",
        False,
        "Take a gradient step after each window; one lane by default.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "dynamic_rate", Options.rate, "Size of the gradient steps.", flag_values=values
    )
    flags.DEFINE_float(
        "dynamic_decay",
        Options.decay,
        "Part of the way back to the first parameters in each step.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Evaluate the run or the checkpoint that the flags select."""
    options = Options(
        values.num_bytes,
        values.window,
        values.lanes,
        values.dynamic_evaluation,
        values.dynamic_rate,
        values.dynamic_decay,
    )
    if values.checkpoint:
        if values.workdir or values.path:
            raise UserError("--checkpoint: must not be combined with --workdir or --path")
        if not values.text:
            raise UserError("--checkpoint: must have --text, the file to evaluate on")
        if values.int8 and options.dynamic:
            raise UserError("--int8: must not be combined with --dynamic_evaluation")
        evaluate_checkpoint(values.checkpoint, values.text, options, in_int8=values.int8)
        return 0
    if values.int8:
        raise UserError("--int8: must have --checkpoint")
    if values.text:
        raise UserError("--text: must have --checkpoint; give --path for a run")
    evaluate(values.workdir, values.which, values.path, options)
    return 0


def evaluate(
    workdir: str, which: str = "latest", path: str = "", options: Options | None = None
) -> dict[str, Any]:
    """Evaluate a checkpoint of a workdir; print and return the result."""
    options = options or Options()
    model, params, config, step = checkpoints.load_for_inference(workdir, which)
    if "task" in config:
        if options.dynamic:
            language.require_text(config, "--dynamic_evaluation")
        return evaluate_task(workdir, which, path, params, config) | {"step": step}
    limit = options.num_bytes or config.eval.final_bytes
    if path:
        name, number, text = path, "bits per byte", [read_file(path)]
    else:
        corpus = pipeline.load_corpus(config.data)
        name, number = f"held-out part of {corpus.name}", "held-out bits per byte"
        text = list(corpus.heldout)
    documents = corpora.take_bytes(text, limit)
    measure = heldout.make_evaluate(
        model,
        lanes=options.lanes or (1 if options.dynamic else config.eval.lanes),
        length=options.window or config.data.length,
        total=options.total(model),
    )
    result = heldout.report(measure(params, documents), documents, sum(map(len, text)))
    _check_finite(result["heldout_bits_per_byte"], options)
    result |= {"step": step}
    print(f"{workdir}, {which} checkpoint (step {step}), {name}")
    print(heldout.format_report(result, f"dynamic {number}" if options.dynamic else number))
    return result


def evaluate_checkpoint(
    path: str, text: str, options: Options, *, in_int8: bool = False
) -> dict[str, Any]:
    """Evaluate a published checkpoint on a file of text; print and return the result."""
    content = finetuning.read_text(text, "--text").encode()
    # A character that the limit splits is left out.
    chosen = content[: options.num_bytes or None].decode("utf-8", "ignore")
    read = published.read_text(
        path,
        chosen,
        window=options.window or CHECKPOINT_WINDOW,
        lanes=options.lanes or 1,
        dtype="float32" if options.dynamic else None,
        in_int8=in_int8,
    )
    nats = options.total(read.model)(read.params(), read.streams, read.window)
    bits = nats / math.log(2) / read.num_bytes
    _check_finite(bits, options)
    result = {
        "perplexity": losses.perplexity(nats / read.num_tokens),
        "tokens": read.num_tokens,
        "context": read.context,
    } | heldout.report(bits, [chosen.encode()], len(content))
    number = "dynamic bits per byte" if options.dynamic else "bits per byte"
    print(f"{path}, {text}")
    print(f"perplexity {result['perplexity']:.4f} on {read.num_tokens:,} tokens{read.remark}")
    print(heldout.format_report(result, number))
    return result


def _check_finite(bits: float, options: Options) -> None:
    if not math.isfinite(bits):
        hint = (
            f"give a smaller --dynamic_rate (now {options.rate:g})"
            if options.dynamic
            else ("the parameters or the logits are not finite")
        )
        raise UserError(f"the log-loss became {bits}: {hint}")


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
    """Return the bytes of the file of the flag `--path`."""
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --path={path}: {error.strerror}") from error
    if not text:
        raise UserError(f"--path={path} is empty: give a file with text in it")
    return text


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
