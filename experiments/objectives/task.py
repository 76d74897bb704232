"""Objectives of runs on tasks: model, batches, loss and test accuracy."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import seqjax
from experiments.base import build, devices
from experiments.base.errors import UserError, nearest
from experiments.data import pipeline
from experiments.objectives.losses import counted_mean, squared_error
from experiments.objectives.whole import WholeModel
from experiments.tasks import batches, examples, in_context, labelled, recall, state_tracking

SYNTHETIC: dict[str, Callable[[ConfigDict], examples.Task]] = {
    **{
        name: functools.partial(lambda name, task: _state_tracking(name, task), name)
        for name in state_tracking.NAMES
    },
    "selective_copying": lambda task: recall.make_copying(
        task.train_length, task.vocab_size, task.data_tokens
    ),
    "induction_heads": lambda task: recall.make_induction(
        task.train_length, tuple(task.test_lengths), task.vocab_size
    ),
    "mqar": lambda task: recall.make_mqar(task.train_length, task.pairs, task.vocab_size),
    **{
        name: functools.partial(
            lambda name, task: recall.make_needles(
                name, task.train_length, tuple(task.test_lengths), task.needles, task.digits
            ),
            name,
        )
        for name in ("passkey", "needles")
    },
    "match_to_sample": lambda task: recall.make_match(
        task.train_length, tuple(task.test_lengths), task.vocab_size
    ),
    "languages": lambda task: in_context.make_languages(
        task.train_length, tuple(task.test_lengths), task.symbols
    ),
}
LABELLED: dict[str, Callable[[ConfigDict, int], labelled.LabelledSet]] = {
    "listops": lambda task, seed: labelled.list_operations(
        task.train_size, task.test_size, seed, shortest=task.shortest, longest=task.longest
    ),
    "digits": lambda task, seed: labelled.digits(seed),
    "images": lambda task, seed: labelled.images(
        task.tfds, task.tfds_dir, seed if task.get("permuted", False) else None
    ),
    "pathfinder": lambda task, seed: labelled.path_finder(
        task.train_size, task.test_size, seed, size=task.size, distractors=task.distractors
    ),
    "packages": lambda task, seed: labelled.packages(task.longest, task.classes, seed),
    "time_series": lambda task, seed: labelled.time_series(task.path),
}


FUNCTIONS = "linear_functions"


def make(config: ConfigDict) -> TokenTask | SequenceTask:
    """Return the objective that `config.task` selects."""
    name = config.task.name
    if name in SYNTHETIC:
        made = SYNTHETIC[name](config.task)
        twice = config.task.get("read_twice", False)
        return TokenTask(config, examples.read_twice(made) if twice else made)
    if name in LABELLED:
        return SequenceTask(config, LABELLED[name](config.task, config.task.seed))
    if name == FUNCTIONS:
        return RegressionTask(
            config, in_context.make_functions(config.task.train_length, config.task.features)
        )
    known = [*SYNTHETIC, *LABELLED, FUNCTIONS]
    raise UserError(f"config.task.name: unknown task {name!r}: {nearest(name, known)}")


def _state_tracking(name: str, task: ConfigDict) -> examples.Task:
    return state_tracking.make(
        name,
        train_length=task.train_length,
        test_lengths=tuple(task.test_lengths),
        last_only=task.last_only,
        curriculum=task.get("curriculum", 0),
    )


class Judged(WholeModel, abc.ABC):
    """Base class of both kinds of tasks; the metric is accuracy."""

    metric = "accuracy"
    lower_is_better = False
    unit = "positions"
    curve = "loss"

    @abc.abstractmethod
    def _evaluate(self, params: Any, final: bool) -> dict[str, Any]:
        """Return the numbers of an evaluation."""

    def make_evaluate(
        self, device_mesh: devices.DeviceMesh
    ) -> Callable[[Any, bool], dict[str, Any]]:
        """Return `evaluate`, whose sharding the compiler chooses."""
        del device_mesh
        return self._evaluate

    def log(self, nats: float) -> dict[str, float]:
        """Return an empty dict: the loss has no other unit."""
        del nats
        return {}

    def coverage(self, result: dict[str, Any]) -> str:
        """Describe the number of test sequences; "" if the log does not have the number."""
        count = result.get("test_sequences")
        return "" if count is None else f"{count:,} test sequences"

    def describe(self, result: dict[str, Any]) -> str:
        """Return all numbers and the number of test sequences as a line of text."""
        numbers = {name: value for name, value in result.items() if name != "test_sequences"}
        line = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        return f"{line} ({self.coverage(result)})"


class TokenTask(Judged):
    """Task with an answer at some positions of each sequence."""

    def __init__(self, config: ConfigDict, task: examples.Task) -> None:
        self._config = config
        self._task = task
        self.name = task.name
        # The configuration determines the data, and checkpoints compare configurations.
        self.fingerprint = "generated"
        self.model = self._build_model()
        data = config.data
        self.batch_shape = (data.batch_size, data.packed_length or task.longest())

    def _build_model(self) -> Any:
        tokens = max(self._task.vocab_size, self._task.num_classes)
        return build.build_model(self._config.model, tokens)

    def batches(self, rows: Any) -> pipeline.Streams:
        """Return endless training batches, see `batches.of_task`; every process makes all rows."""
        del rows
        data = self._config.data
        made = batches.of_task(
            self._task,
            batch_size=data.batch_size,
            seed=self._config.seed,
            packed_length=data.packed_length,
        )
        return pipeline.Streams({0: made}, data.batch_size)

    def prepare(self, batch: Any) -> Any:
        """Convert segment ids to resets."""
        reset = seqjax.segment_starts(batch["segment_ids"])
        return {name: batch[name] for name in ("inputs", "targets", "counted")} | {"reset": reset}

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean cross-entropy over the counted positions."""
        return counted_mean(model, params, batch, sequence_axis)

    @functools.cached_property
    def _right(self) -> Callable[..., jax.Array]:
        @jax.jit
        def right(params: Any, inputs: jax.Array, targets: jax.Array, counted: jax.Array) -> Any:
            logits, _ = self.model.apply(params, inputs)
            return jnp.sum((jnp.argmax(logits, axis=-1) == targets) & counted)

        return right

    def _evaluate(self, params: Any, final: bool) -> dict[str, Any]:
        """Return the accuracy at every test length if `final`, else at the longest length.

        `accuracy` is that of the longest length. `scaled_accuracy` maps chance to 0 and 1 to 1.
        `test_sequences` is the number of sequences of the longest length.
        """
        task, evaluation = self._task, self._config.eval
        count = evaluation.sequences if final else evaluation.quick
        result: dict[str, Any] = {}
        for length in task.test_lengths if final else task.test_lengths[-1:]:
            test = examples.test_examples(task, self._config.task.seed, length, count)
            rows = max(1, min(count, evaluation.tokens // test.inputs.shape[1]))
            right = 0
            for start in range(0, count - rows + 1, rows):
                part = (x[start : start + rows] for x in test)
                right += int(self._right(params, *part))
            asked = test.counted[: count // rows * rows].sum()
            result[f"accuracy_{length}"] = float(right / asked)
        result["accuracy"] = result[f"accuracy_{task.test_lengths[-1]}"]
        result["test_sequences"] = count // rows * rows
        if final and task.chance is not None:
            result["chance"] = task.chance
            result["scaled_accuracy"] = (result["accuracy"] - task.chance) / (1 - task.chance)
        return result


class RegressionTask(TokenTask):
    """Task with a number at every position, to predict from the positions before it."""

    metric = "error"
    lower_is_better = True

    def _build_model(self) -> Any:
        return build.build_feature_model(self._config.model, self._task.vocab_size, 1)

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean squared error."""
        return counted_mean(model, params, batch, sequence_axis, squared_error)

    @functools.cached_property
    def _errors(self) -> Callable[..., jax.Array]:
        @jax.jit
        def errors(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            outputs, _ = self.model.apply(params, inputs)
            return squared_error(outputs, targets).mean(axis=0)

        return errors

    def _evaluate(self, params: Any, final: bool) -> dict[str, Any]:
        """Return squared errors relative to the mean square of targets, by number of examples.

        `error` is that of the last position. `least_squares` has the errors of the solution of
        least norm, which is optimal.
        """
        task, evaluation = self._task, self._config.eval
        count = evaluation.sequences if final else evaluation.quick
        test = examples.test_examples(task, self._config.task.seed, task.train_length, count)
        scale = np.square(test.targets).mean()
        errors = np.asarray(self._errors(params, test.inputs, test.targets)) / scale
        result: dict[str, Any] = {"error": float(errors[-1])}
        if final:
            last = task.train_length - 1
            for seen in (last // 4, last // 2, last):
                best = in_context.least_squares(test.inputs, test.targets, seen)
                result[f"error_{seen}"] = float(errors[seen])
                result[f"least_squares_{seen}"] = float(best / scale)
        return result | {"test_sequences": count}


class SequenceTask(Judged):
    """Task with one label per sequence."""

    def __init__(self, config: ConfigDict, data: labelled.LabelledSet) -> None:
        self._config = config
        self._data = data
        self.name = data.name
        self.fingerprint = fingerprint(data)
        self.model = build.build_classifier(
            config.model,
            data.num_classes,
            vocab_size=data.vocab_size,
            input_dim=data.input_dim,
            pool=config.task.pool,
        )
        longest = max(map(len, data.train.inputs))
        self._length = min(longest, config.data.length) if config.data.length else longest
        self.batch_shape = (config.data.batch_size, self._length)

    def batches(self, rows: Any) -> pipeline.Streams:
        """Return endless training batches, see `batches.of_labelled`, with all rows."""
        del rows
        size = self._config.data.batch_size
        made = batches.of_labelled(
            self._data.train, length=self._length, batch_size=size, seed=self._config.seed
        )
        return pipeline.Streams({0: made}, size)

    def prepare(self, batch: Any) -> Any:
        """Return the batch unchanged."""
        return batch

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean cross-entropy over the batch."""
        logits, _ = model.apply(
            params, batch["inputs"], mask=batch["mask"], sequence_axis=sequence_axis
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @functools.cached_property
    def _right(self) -> Callable[..., jax.Array]:
        @jax.jit
        def right(params: Any, batch: Any) -> jax.Array:
            logits, _ = self.model.apply(params, batch["inputs"], mask=batch["mask"])
            return jnp.sum(jnp.argmax(logits, axis=-1) == batch["label"])

        return right

    def _evaluate(self, params: Any, final: bool) -> dict[str, Any]:
        """Return the accuracy on the test set if `final`, else on a part of it."""
        test = self._data.test
        if not final:
            order = np.random.default_rng(0).permutation(len(test.labels))
            order = order[: self._config.eval.quick]
            test = labelled.Split([test.inputs[i] for i in order], test.labels[order])
        rows: Iterator[Any] = batches.in_order(
            test, length=self._length, batch_size=self._config.data.batch_size
        )
        right = sum(int(self._right(params, batch)) for batch in rows)
        result = {"accuracy": right / len(test.labels), "test_sequences": len(test.labels)}
        return result | {"majority": self._data.majority()} if final else result


def fingerprint(data: labelled.LabelledSet) -> str:
    """Return text that changes when a sequence or a label of the data changes."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        digest.update(split.labels.tobytes())
        for x in split.inputs:
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]
