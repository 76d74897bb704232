"""Objective of runs on images, with accuracies on images of several sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.base import build
from experiments.base.errors import UserError
from experiments.objectives.task import SequenceTask, fingerprint
from experiments.tasks import arrows, batches, labelled
from experiments.tasks.labelled import LabelledSet, Split


def _arrows(task: ConfigDict) -> tuple[LabelledSet, dict[int, Split]]:
    """Return the sets of the training size, and a test set for each size."""
    train = arrows.generate(np.random.default_rng([task.seed, 0]), task.train_size, task.side)
    tests = {
        side: arrows.generate(np.random.default_rng([task.seed, side]), task.test_size, side)
        for side in task.test_sides
    }
    last = tests[task.test_sides[-1]]
    return LabelledSet("arrow pointing", 2, train, last, input_dim=arrows.CHANNELS), tests


def _digits(task: ConfigDict) -> tuple[LabelledSet, dict[int, Split]]:
    """Return the digits as images of 8 x 8 pixels."""
    data = labelled.digits(task.seed)

    def pictures(split: Split) -> Split:
        pixels: Any = np.asarray(split.inputs)
        return Split(pixels.reshape(-1, 8, 8, 1), split.labels)

    train, test = pictures(data.train), pictures(data.test)
    return LabelledSet("digits", 10, train, test, input_dim=1), {8: test}


TASKS: dict[str, Callable[[ConfigDict], tuple[LabelledSet, dict[int, Split]]]] = {
    "arrows": _arrows,
    "image_digits": _digits,
}


class ImageTask(SequenceTask):
    """Task with one label per image."""

    unit = "pixels"

    def __init__(self, config: ConfigDict) -> None:
        if config.mesh:
            raise UserError("config.mesh: runs on images have one device; leave it empty")
        self._config = config
        self._data, self._tests = TASKS[config.task.name](config.task)
        self.name = self._data.name
        self.fingerprint = fingerprint(self._data)
        assert self._data.input_dim is not None
        self.model = build.build_image_classifier(
            config.model, self._data.num_classes, self._data.input_dim, config.task.pool
        )
        shape = np.shape(self._data.train.inputs[0])
        self._length = shape[0]
        self.batch_shape = (config.data.batch_size, shape[0] * shape[1])

    def prepare(self, batch: Any) -> Any:
        """Return images and labels; images have no padding, and so no mask."""
        return {name: batch[name] for name in ("inputs", "label")}

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean cross-entropy over the batch."""
        del sequence_axis
        logits, _ = model.apply(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @functools.cached_property
    def _right(self) -> Callable[..., jax.Array]:
        @jax.jit
        def right(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            logits, _ = self.model.apply(params, images)
            return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

        return right

    def _evaluate(self, params: Any, final: bool) -> dict[str, Any]:
        """Return the accuracy at every size if `final`, else on a part of the largest images.

        `accuracy` is that of the largest images.
        """
        sides = list(self._tests) if final else list(self._tests)[-1:]
        result: dict[str, Any] = {}
        for side in sides:
            images, labels = self._tests[side]
            count = len(labels) if final else min(len(labels), self._config.eval.quick)
            rows: Iterator[Any] = batches.in_order(
                Split(images[:count], labels[:count]),
                length=side,
                batch_size=self._config.data.batch_size,
            )
            right = sum(int(self._right(params, row["inputs"], row["label"])) for row in rows)
            result[f"accuracy_{side}"] = right / count
        result["accuracy"] = result[f"accuracy_{sides[-1]}"]
        result["test_sequences"] = count
        return result | {"majority": self._data.majority()} if final else result
