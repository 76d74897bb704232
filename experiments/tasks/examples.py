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

      targets: [count, T] int32.

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

      vocab_size: number of input tokens.

      num_classes: number of answers.

      generate: (rng, count, T) -> Examples. If `shortest` is set, every prefix of an allowed
        length must be an example too.

      train_length: T of training sequences, or the maximum if lengths vary.

      test_lengths: T of each test.

      shortest: minimum T of training sequences; None if all have the same length.

      step: allowed lengths are `shortest`, `shortest + step`, ...

      last_only: whether only the last prediction of a sequence counts.

      chance: accuracy of the best constant answer, if known.
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

    def __post_init__(self) -> None:
        if self.shortest is not None and (self.train_length - self.shortest) % self.step:
            raise ValueError(f"{self.name}: no length of the steps {self.step} is the longest")

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
        examples, lengths = self._block(block)
        length = lengths[row]
        example = {name: x[row, :length] for name, x in examples._asdict().items()}
        return last_alone(example) if self._task.last_only else example

    def __repr__(self) -> str:
        return f"Source({self._task.name}, seed={self._seed})"

    def _make_block(self, block: int) -> tuple[Examples, np.ndarray]:
        task, rng = self._task, np.random.default_rng([self._seed, 0, block])
        examples = task.generate(rng, BLOCK, task.train_length)
        lengths = np.full(BLOCK, examples.inputs.shape[1])
        if task.shortest is not None:
            kinds = (task.train_length - task.shortest) // task.step + 1
            lengths = task.shortest + task.step * rng.integers(kinds, size=BLOCK)
        return examples, lengths


def last_alone(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the example with only its last prediction counted."""
    counted = np.zeros_like(example["counted"])
    counted[..., -1] = True
    return {**example, "counted": counted}


def read_twice(task: Task) -> Task:
    """Return the task with every sequence twice in a row; only answers of the second copy count.

    JRT-prompt of Just read twice (arXiv 2407.05483): a model with a state of fixed size knows the
    questions when it reads the text again, and stores what they ask for.
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
