"""Fine-tuning of a published checkpoint, with adapters or all weights; rerun it to resume.

    python -m experiments.finetune --checkpoint=path/to/mamba-130m-hf --data=book.txt
    python -m experiments.finetune --checkpoint=path/to/granite-4.0-h-350m --data=chats.jsonl \\
        --lora_rank=16 --config.steps=1000 --export=path/to/result

A .jsonl file has one object per line: {"messages": [{"role": ..., "content": ...}]}, of which the
turns of the assistant are learned, or {"text": ...}. Any other file is one text. `--export` writes
the result in the format of the checkpoint.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import train
from experiments.base import allocator, cli, devices
from experiments.base.errors import UserError

CONFIG = os.path.relpath(pathlib.Path(__file__).parent / "configs" / "finetune.py")


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    cli.define_config(values, argv, default=CONFIG)
    devices.define_flags(values)
    flags.DEFINE_string(
        "checkpoint",
        "",
        "Folder of a published checkpoint, or its name on the Hugging Face hub.",
        flag_values=values,
    )
    flags.DEFINE_string("data", "", "File of text, or a .jsonl file.", flag_values=values)
    flags.DEFINE_string(
        "workdir", "", "Folder of the run; by default runs/finetune-DATA.", flag_values=values
    )
    flags.DEFINE_integer(
        "lora_rank", None, "Rank of the adapters; 0 trains all weights.", flag_values=values
    )
    flags.DEFINE_string(
        "export", "", "New folder for the result, in the checkpoint's format.", flag_values=values
    )


def main(values: Any) -> int:
    """Fine-tune the checkpoint that the flags select."""
    config = cli.require_config(values)
    _apply_flags(config, values)
    devices.initialize(values)
    workdir = pathlib.Path(values.workdir or train.default_workdir(config))
    if values.export:
        _check_export(values.export, workdir)
    return finetune(config, workdir, values.export)["exit_code"]


def finetune(config: ConfigDict, workdir: pathlib.Path, export: str = "") -> dict[str, Any]:
    """Train, evaluate and export; return the content of summary.json."""

    def finish(objective: Any, params: Any) -> None:
        objective.export(params, export)
        train.say(f"exported to {export}")

    return train.train(config, workdir, finish if export else None)


def _apply_flags(config: ConfigDict, values: Any) -> None:
    if "checkpoint" not in config.model:
        raise UserError(f"--config: must be a configuration of fine-tuning, such as {CONFIG}")
    if values.checkpoint:
        config.model.checkpoint = values.checkpoint
    if values.data:
        config.data.path = values.data
    if values.lora_rank is not None:
        config.model.lora_rank = values.lora_rank
    if not config.model.checkpoint:
        raise UserError("no --checkpoint: give the folder of a published checkpoint")


def _check_export(folder: str, workdir: pathlib.Path) -> None:
    """Check before the training that the result can be written."""
    if jax.process_count() > 1:
        raise UserError("--export: must have one process; run the command again in one process")
    path = pathlib.Path(folder).expanduser().resolve()
    if workdir.resolve().is_relative_to(path):
        raise UserError(f"--export={folder}: must not be or contain the workdir {workdir}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--export={folder}: must be a new or empty folder")


if __name__ == "__main__":
    allocator.keep_memory()  # before JAX starts its backend
    sys.exit(cli.run(define_flags, main))
