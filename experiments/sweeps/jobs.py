"""Jobs, and grids of them."""

from __future__ import annotations

import dataclasses
from typing import Any

RATE = "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
      label: name of the table row; jobs that differ by learning rate share it.

      config: FILE:WORDS.

      overrides: dotted fields of the configuration and their values.
    """

    label: str
    config: str
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Jobs and the table of their results.

    Attributes:
      title: title of the table.

      jobs: jobs to run for every seed.

      columns: name in the run's summary -> column header.

      metric: name of the number that selects the learning rate.

      published: published results by label.

      source: the paper with the published results.

      lower: whether a smaller metric is better.

      figure: the horizontal axis of a figure: an override, "length" for the lengths in the names
        of the columns, or "label" for the end of the labels. "curve" shows the metric over tokens
        and over seconds, "map" layers by tasks of state tracking; "" is no figure.

      axis: name of the horizontal axis; by default the last part of the override.

      answers: number of answers in a longest test sequence, for a column with the horizon; 0 for
        none.

      relative: name in the run's summary -> label; the column shows ratios to this label's number.
    """

    title: str
    jobs: tuple[Job, ...]
    columns: dict[str, str]
    metric: str
    published: dict[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""
    lower: bool = False
    figure: str = ""
    axis: str = ""
    answers: int = 0
    relative: dict[str, str] = dataclasses.field(default_factory=dict)


def each(file: str, task: str, layers: tuple[str, ...]) -> tuple[Job, ...]:
    """Return a job for every layer, with the defaults of the task's configuration."""
    return tuple(Job(layer, f"{file}:{task},{layer}", {}) for layer in layers)
