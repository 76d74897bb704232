"""Orbax checkpoints of a run: the newest ones, and the best one in a separate folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from ml_collections import ConfigDict

from experiments.base import build
from experiments.base.errors import UserError, system_error
from experiments.objectives import protocol

# Sections that may change between a checkpoint and the run that resumes it.
_MAY_CHANGE = (
    "optimizer",
    "steps",
    "stop_at",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "eval",
    "mesh",
    "mesh_axis_types",
    "sample",
)

_LONGEST_LINE = 200 - len("error: ")
# Room for the metadata of a checkpoint and for the log.
_SPARE_BYTES = 1 << 20


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Drop warnings of Orbax, which only repeat the options set here."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = absl_logging.get_absl_logger()
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


class Checkpoints:
    """Save and restores `state` (arrays) and `meta` (JSON) of the run in a workdir."""

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        self._workdir = workdir
        self._latest = _manager(workdir / "checkpoints", keep)
        # A single manager that keeps the best checkpoint may delete the newest, needed to resume.
        self._best = _manager(workdir / "best", 1)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._latest.latest_step()

    @_without_warnings()
    def save(self, step: int, state: Any, meta: dict[str, Any], *, best: bool = False) -> None:
        """Save the newest state and, if it is the best so far, a second copy of it."""
        managers = [self._latest, self._best] if best else [self._latest]
        _check_space(self._latest.directory, state, len(managers))
        for manager in managers:
            if manager.latest_step() == step:
                continue
            if jax.process_count() > 1:
                # Orbax numbers barriers between processes by the order of calls. Two managers
                # that save at the same time may call in different orders on different processes.
                self.wait()
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state["params"]),
                    optimizer=ocp.args.StandardSave(state["optimizer"]),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def resume(
        self, config: ConfigDict, fingerprint: str, like: Any
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restore the newest checkpoint of a run as (step, state, meta); None if there is none.

        Args:
          config: the configuration of the run, which must equal the saved configuration.

          fingerprint: the fingerprint of the run's data, which must equal the saved one.

          like: a state with the shapes and shardings to restore.
        """
        step = self.latest_step()
        if step is None:
            return None
        meta = self.meta(step)
        check_same_run(self._workdir, meta, config, fingerprint)
        if step > config.steps:
            raise UserError(
                f"{self._workdir} is at step {step} already: give --config.steps={step} or more, "
                "or another --workdir"
            )
        return step, self.restore(step, like), meta

    def meta(self, step: int) -> dict[str, Any]:
        """Return the JSON stored with a checkpoint."""
        return _restore_meta(self._latest, step)

    def restore(self, step: int, like: Any) -> Any:
        """Return the state at `step` with the shardings of the arrays of `like`."""
        # The run repeats the later steps. An old best checkpoint would block a new one.
        for later in self._best.all_steps():
            if later > step:
                self._best.delete(later)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = _restore(
            self._latest,
            step,
            params=ocp.args.StandardRestore(abstract["params"]),
            optimizer=ocp.args.StandardRestore(abstract["optimizer"]),
        )
        return {"params": restored["params"], "optimizer": restored["optimizer"]}

    def wait(self) -> None:
        """Wait until all checkpoints are on disk; raise the errors of saving."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Finish saving and close both folders."""
        try:
            self._latest.close()
        finally:
            self._best.close()


def _check_space(folder: Any, state: Any, copies: int) -> None:
    """Raise an error before writing if the disk has no room for a whole checkpoint."""
    size = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"a checkpoint needs {size} bytes, {free} are free")


@_without_warnings()
def _manager(folder: Path, keep: int | None, read_only: bool = False) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not read_only, read_only=read_only
    )
    return ocp.CheckpointManager(
        folder.resolve(), options=options, item_names=("params", "optimizer", "meta")
    )


@_without_warnings()
def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if not isinstance(error, FileNotFoundError) and system_error(error) is not None:
            raise
        raise _damaged(manager, step, str(error)) from error


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = _restore(manager, step, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict):
        raise _damaged(manager, step, "meta must be a JSON object")
    missing = {"config", "data", "fingerprint", "best"} - meta.keys()
    if missing:
        raise _damaged(manager, step, f"meta has no {min(missing)!r}")
    return meta


def _damaged(manager: ocp.CheckpointManager, step: int, reason: str) -> UserError:
    """Return a one-line error; `reason` may be pages of text from a C++ library."""
    folder = _shorten(os.path.relpath(str(manager.directory / str(step))), 60, keep_end=True)
    hint = "delete this folder or start with a new --workdir"
    room = _LONGEST_LINE - len(f"checkpoint {folder} is damaged (): {hint}")
    first = (reason.splitlines() or ["no reason given"])[0]
    return UserError(f"checkpoint {folder} is damaged ({_shorten(first, room)}): {hint}")


def _shorten(text: str, length: int, *, keep_end: bool = False) -> str:
    if len(text) <= length:
        return text
    return "..." + text[3 - length :] if keep_end else text[: length - 3] + "..."


def check_same_run(
    workdir: Path, meta: dict[str, Any], config: ConfigDict, fingerprint: str
) -> None:
    """Raise an error if the checkpoint has another configuration or other data."""
    changed = [
        line
        for line in build.differences(meta["config"], build.to_json(config))
        if line.split(":")[0].split(".")[0] not in _MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"the checkpoint in {workdir} was made with other settings ({'; '.join(changed)}): "
            "use the old settings or another --workdir"
        )
    if meta["fingerprint"] != fingerprint:
        raise UserError(
            f"the text or the published model has changed since the checkpoint in {workdir} was "
            "made, so the run cannot resume: start with a new --workdir"
        )


def load_for_inference(workdir: str, which: str) -> tuple[Any, Any, ConfigDict, int]:
    """Rebuild the model of a workdir; return (model, params, config, step)."""
    if not workdir:
        raise UserError("no --workdir: give the folder of a run, for example --workdir=runs/NAME")
    folder = Path(workdir) / ("best" if which == "best" else "checkpoints")
    if not folder.is_dir():
        raise UserError(
            f"no {which} checkpoint in {workdir}: train first with python -m experiments.train"
        )
    # Read only: a training run may be writing to the same folder.
    with _manager(folder, None, read_only=True) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(
                f"no {which} checkpoint in {workdir}: train first with python -m experiments.train"
            )
        meta = _restore_meta(manager, step)
        config = ConfigDict(meta["config"])
        if "checkpoint" in config.model:
            raise UserError(
                f"--workdir={workdir}: must be a run of experiments.train, got one of"
                " experiments.finetune; run it with --export=FOLDER, then use --checkpoint=FOLDER"
            )
        model = protocol.make(config).model if "task" in config else build.build_model(config.model)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            jax.eval_shape(model.init, jax.random.key(0)),
        )
        params = _restore(manager, step, params=ocp.args.StandardRestore(like))["params"]
    return model, params, config, step
