"""What a run learns, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from experiments.base.devices import Devices
from experiments.objectives import language
from experiments.objectives import task as tasks


class Objective(Protocol):
    """A model, its batches, its loss, and a number that says how good it is.

    Attributes:
      name: of the data, for people.
      fingerprint: changes when the data does.
      model: follows the protocol of a layer.
      batch_shape: (B, T) of a training batch.
      unit: what a position is called.
      metric: the name of the number that `evaluate` judges by.
      lower_is_better: whether that is so.
      curve: what is drawn of the training steps: a name in their rows.
    """

    name: str
    fingerprint: str
    model: Any
    batch_shape: tuple[int, int]
    unit: str
    metric: str
    lower_is_better: bool
    curve: str

    def batches(self, rows: Any) -> Any:
        """An endless iterator over batches, with `get_state` and `set_state` in JSON values."""

    def prepare(self, batch: Any) -> Any:
        """A batch as the loss takes it; traced, before time is split."""

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """A mean, over the whole batch and all of time."""

    def log(self, nats: float) -> dict[str, float]:
        """What a loss is called besides, for the log."""

    def make_evaluate(self, place: Devices) -> Callable[[Any, bool], dict[str, Any]]:
        """Returns `evaluate(params, final)`: numbers by name, `metric` among them."""

    def coverage(self, result: dict[str, Any]) -> str:
        """Return which of the held-out data `evaluate` read for a result, in words."""

    def describe(self, result: dict[str, Any]) -> str:
        """What `evaluate` returned as a line for people."""


def make(config: ConfigDict) -> Objective:
    """The objective of a configuration: its task, or its text where it has none."""
    return tasks.make(config) if "task" in config else language.Text(config)
