"""Generated tasks: training sequences by index, so that a run can resume at any step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

BLOCK = 256  # sequences generated per call


class Examples(NamedTuple):
    """Sequences of one length with a target for each position.

    Attributes:
      inputs: [count, T] int32 tokens, or [count, T, features] float32.

      targets: [count, T] int32 answers, or float32 numbers.

      counted: [count, T] bool, the positions whose predictions count.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counted: np.ndarray


Generate = Callable[[np.random.Generator, int, int], Examples]


@dataclasses.dataclass(frozen=True)
class Task:
    """Task with generated sequences.

    Attributes:
      name: name of the task.

      vocab_size: number of input tokens, or features per position.

      num_classes: number of answers; 1 for numbers.

      generate: (rng, count, T) -> Examples. If `shortest` is set, every prefix of an allowed
        length must be an example too.

      train_length: T of training sequences, or the maximum if lengths vary.

      test_lengths: T of each test.

      shortest: minimum T of training sequences; None if all have the same length.

      step: allowed lengths are `shortest`, `shortest + step`, ...

      last_only: whether only the last prediction of a sequence counts.

      chance: accuracy of the best constant answer, if known.

      curriculum: number of training rows over which the length of sequences grows from `shortest`
        to `train_length`; 0 for none. Rows then contain several sequences of equal length.
    """

    name: str
    vocab_size: int
    num_classes: int
    generate: Generate
    train_length: int
    test_lengths: tuple[int, ...]
    shortest: int | None = None
    step: int = 1
    last_only: bool = False
    chance: float | None = None
    curriculum: int = 0

    def __post_init__(self) -> None:
        if self.curriculum and self.shortest is None:
            raise ValueError(f"{self.name}: a curriculum needs sequences of several lengths")
        if self.shortest is not None and (self.train_length - self.shortest) % self.step:
            raise ValueError(f"{self.name}: no length of the steps {self.step} is the longest")

    def length_at(self, row: int) -> int | None:
        """Return the length of the curriculum's sequences at a training row; None after its end.

        The length grows geometrically, because each step of a recurrence builds on shorter ones.
        """
        if row >= self.curriculum or self.shortest is None:
            return None
        growth = (self.train_length / self.shortest) ** (row / self.curriculum)
        return self.shortest + int(self.shortest * (growth - 1)) // self.step * self.step

    def longest(self) -> int:
        """Return the number of positions of the longest training sequence, with its answers."""
        return self.generate(np.random.default_rng(0), 1, self.train_length).inputs.shape[1]


class Source:
    """Training sequences by index, each a dict of [T] arrays; a seed determines all of them."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        block, row = divmod(int(index), BLOCK)
        arrays, lengths = self._block(block)
        return {name: x[row, : lengths[row]] for name, x in arrays.items()}

    def __repr__(self) -> str:
        return f"Source({self._task.name}, seed={self._seed})"

    def _make_block(self, block: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        task, rng = self._task, np.random.default_rng([self._seed, 0, block])
        if (length := task.length_at(block * BLOCK)) is not None:
            return _rows_of_equals(task, rng, length)
        arrays = dict(task.generate(rng, BLOCK, task.train_length)._asdict())
        lengths = np.full(BLOCK, arrays["inputs"].shape[1])
        if task.shortest is not None:
            kinds = (task.train_length - task.shortest) // task.step + 1
            lengths = task.shortest + task.step * rng.integers(kinds, size=BLOCK)
        if task.last_only:
            arrays["counted"] = np.arange(arrays["inputs"].shape[1]) == lengths[:, None] - 1
        arrays["segment_ids"] = np.ones(arrays["inputs"].shape[:2], np.int32)
        return arrays, lengths


def _rows_of_equals(
    task: Task, rng: np.random.Generator, length: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return a block of rows with as many sequences of `length` as fit, and their sizes."""
    fit = task.train_length // length
    examples = task.generate(rng, BLOCK * fit, length)._asdict()
    examples = last_alone(examples) if task.last_only else examples
    arrays = {name: x.reshape(BLOCK, fit * length, *x.shape[2:]) for name, x in examples.items()}
    ids = np.repeat(np.arange(1, fit + 1, dtype=np.int32), length)
    arrays["segment_ids"] = np.tile(ids, (BLOCK, 1))
    return arrays, np.full(BLOCK, fit * length)


def last_alone(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the example with only its last prediction counted."""
    counted = np.zeros_like(example["counted"])
    counted[..., -1] = True
    return {**example, "counted": counted}


def read_twice(task: Task) -> Task:
    """Return the task with every sequence twice in a row; only answers of the second copy count.

    This is the JRT-prompt of Just read twice (arXiv 2407.05483). When a model reads the second
    copy, its state already contains the questions. It can then store only the relevant text.
    """
    if task.shortest is not None:
        raise ValueError(
            f"{task.name}: sequences that are read twice must have one length, got shortest="
            f"{task.shortest}."
        )

    def generate(rng: np.random.Generator, count: int, length: int) -> Examples:
        inputs, targets, counted = task.generate(rng, count, length)
        return Examples(
            np.concatenate([inputs, inputs], axis=1),
            np.concatenate([targets, targets], axis=1),
            np.concatenate([np.zeros_like(counted), counted], axis=1),
        )

    return dataclasses.replace(task, generate=generate)


def test_examples(task: Task, seed: int, length: int, count: int) -> Examples:
    """Return test sequences of a length, independent of the training sequences."""
    examples = task.generate(np.random.default_rng([seed, 1, length]), count, length)
    return Examples(**last_alone(examples._asdict())) if task.last_only else examples
