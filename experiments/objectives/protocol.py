"""Protocol of objectives: the model, data, loss and metric of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError
from experiments.objectives import finetune, image, language
from experiments.objectives import task as tasks


class Objective(Protocol):
    """A model, its batches, its loss, and its held-out metric.

    Attributes:
      name: name of the data, for messages.

      fingerprint: text that changes when the data changes.

      model: the model, which follows the protocol of a layer.

      trained: the parameters to train, with `init`, `param_axes`, `param_roles` and
        `param_shapes` as a layer has them: the model, or its adapters.

      frozen: parameters that are not trained, after `load`; None without.

      batch_shape: (B, T) of a training batch.

      unit: name of a position in messages, such as "bytes".

      metric: name of the number in the result of `evaluate` that compares models.

      lower_is_better: whether a smaller metric is better.

      curve: name of the number of each training step to plot.
    """

    name: str
    fingerprint: str
    model: Any
    frozen: Any
    batch_shape: tuple[int, int]
    unit: str
    metric: str
    lower_is_better: bool
    curve: str

    @property
    def trained(self) -> Any:
        """Return the model, or its adapters."""

    def load(self, device_mesh: DeviceMesh) -> Any:
        """Load published weights; return the first trained parameters, or None to draw them."""

    def merge(self, params: Any, frozen: Any) -> Any:
        """Return the parameters of the model from the trained and the frozen ones; traced."""

    def batches(self, rows: Any) -> Any:
        """Return an endless iterator of batches; its state is made of JSON values."""

    def prepare(self, batch: Any) -> Any:
        """Convert a batch to the arguments of the loss; traced, before time is split."""

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean loss over the whole batch and all of time."""

    def log(self, nats: float) -> dict[str, float]:
        """Return the loss in other units, by name, for the log."""

    def make_evaluate(self, device_mesh: DeviceMesh) -> Callable[[Any, bool], dict[str, Any]]:
        """Return `evaluate(params, final)`, which returns numbers by name, including `metric`."""

    def coverage(self, result: dict[str, Any]) -> str:
        """Describe which held-out data a result of `evaluate` covers; "" if unknown."""

    def describe(self, result: dict[str, Any]) -> str:
        """Return a result of `evaluate` as a line of text."""


def make(config: ConfigDict) -> Objective:
    """Return the objective of a configuration: its task, its checkpoint, or its text."""
    if "game" in config:
        raise UserError(f"{config.name}: only experiments.train runs games")
    if "checkpoint" in config.model:
        return finetune.FineTune(config)
    if "task" not in config:
        return language.Text(config)
    return image.ImageTask(config) if config.task.name in image.TASKS else tasks.make(config)
