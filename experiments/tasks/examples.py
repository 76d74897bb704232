"""What a task is: labelled sequences by index, so that a run can stop and resume anywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

BLOCK = 256  # sequences are made so many at a time


class Examples(NamedTuple):
    """Sequences of one length, each position with what is to be said there.

    Attributes:
      inputs: [count, T] int32 tokens, or [count, T, features] float32.
      targets: [count, T] int32.
      counted: [count, T] bool, the positions at which a prediction is asked for.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counted: np.ndarray


Generate = Callable[[np.random.Generator, int, int], Examples]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose sequences a generator makes.

    Attributes:
      name: for people.
      vocab_size: number of input tokens.
      num_classes: number of answers.
      generate: (rng, count, T) -> Examples. Where `shortest` is set, every prefix of an allowed
        length is an example as well.
      train_length: T of training sequences, the longest where they vary.
      test_lengths: T of every test.
      shortest: the shortest training sequence; None where all are of one length.
      step: allowed lengths are `shortest`, `shortest + step`, ...
      last_only: whether only the last prediction of a sequence counts.
      chance: accuracy of the best constant answer, where it is known.
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
        """Positions of the longest training sequence, those in which answers are given included."""
        return self.generate(np.random.default_rng(0), 1, self.train_length).inputs.shape[1]


class Source:
    """Training sequences by index, each a dict of [T] arrays; the same ones for a seed, always."""

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
        found = {name: x[row, :length] for name, x in examples._asdict().items()}
        return last_alone(found) if self._task.last_only else found

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
    """The example with its last prediction as the only one that counts."""
    counted = np.zeros_like(example["counted"])
    counted[..., -1] = True
    return {**example, "counted": counted}


def test_examples(task: Task, seed: int, length: int, count: int) -> Examples:
    """Test sequences of a length, from a stream of their own."""
    examples = task.generate(np.random.default_rng([seed, 1, length]), count, length)
    return Examples(**last_alone(examples._asdict())) if task.last_only else examples
