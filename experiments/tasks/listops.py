"""ListOps as in the Long Range Arena (arXiv 2011.04006): nested operations on digits.

A node above the last level is an operation with probability 1/4, else a digit. An operation has 2
to 10 arguments, which are nodes. Expressions whose number of tokens is not strictly between two
bounds are discarded. Answers are not balanced.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

OPERATORS = ("MIN", "MAX", "MED", "SM")
OPERATION_PROBABILITY = 0.25
FIRST_OPERATOR, END, VOCAB_SIZE = 10, 14, 15  # tokens: digits, operators, the closing bracket


class _Level(NamedTuple):
    """Nodes of all trees at one depth, in order; the children of a node are adjacent."""

    operator: np.ndarray  # -1 for a digit
    value: np.ndarray  # value of a digit
    first: np.ndarray  # index of the first child in the next level
    arguments: np.ndarray  # number of children
    tree: np.ndarray


def _grow(rng: np.random.Generator, count: int, depth: int, most: int) -> list[_Level]:
    """Generate trees level by level."""
    levels, tree = [], np.arange(count)
    for level in range(1, depth + 1):
        size = len(tree)
        inner = (rng.random(size) <= OPERATION_PROBABILITY) & (level < depth)
        operator = np.where(inner, rng.integers(0, len(OPERATORS), size), -1)
        arguments = np.where(inner, rng.integers(2, most + 1, size), 0)
        first = np.cumsum(arguments) - arguments
        levels.append(_Level(operator, rng.integers(0, 10, size), first, arguments, tree))
        tree = np.repeat(tree, arguments)
    return levels


def _fold(level: _Level, values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the values and token counts of a level's nodes from those of their children."""
    value, length = level.value.copy(), np.ones(len(level.value), np.int64)
    inner = np.flatnonzero(level.arguments)
    if not len(inner):
        return value, length
    first, arguments, operator = (x[inner] for x in (level.first, level.arguments, level.operator))
    length[inner] = 2 + np.add.reduceat(lengths, first)
    ordered = values[np.lexsort((values, np.repeat(np.arange(len(inner)), arguments)))]
    low, high = ordered[first + (arguments - 1) // 2], ordered[first + arguments // 2]
    results = (
        np.minimum.reduceat(values, first),
        np.maximum.reduceat(values, first),
        (low + high) // 2,
        np.add.reduceat(values, first) % 10,
    )
    value[inner] = np.choose(operator, results)
    return value, length


def _write(levels: list[_Level], lengths: list[np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    """Write the token sequences of the trees `chosen`; parents determine the positions of nodes."""
    sizes = lengths[0][chosen]
    starts = np.cumsum(sizes) - sizes
    text = np.empty(sizes.sum(), np.int32)
    # First token of each node; -1 in trees that are not chosen.
    position = np.full(len(lengths[0]), -1)
    position[chosen] = starts
    for level, length, below in zip(levels, lengths, [*lengths[1:], None], strict=True):
        shown = position >= 0
        inner = shown & (level.arguments > 0)
        digits = shown & ~inner
        text[position[digits]] = level.value[digits]
        text[position[inner]] = FIRST_OPERATOR + level.operator[inner]
        text[position[inner] + length[inner] - 1] = END
        if below is None or not len(below):
            break
        before = np.cumsum(below) - below
        parent = np.repeat(np.arange(len(position)), level.arguments)
        offset = before - before[level.first[parent]]
        position = np.where(position[parent] >= 0, position[parent] + 1 + offset, -1)
    return np.split(text, starts[1:])


def generate(
    rng: np.random.Generator,
    count: int,
    *,
    depth: int = 10,
    most_arguments: int = 10,
    shortest: int = 500,
    longest: int = 2000,
    block: int = 4096,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Generate `count` expressions of more than `shortest` and fewer than `longest` tokens.

    Returns:
      (token sequences, int32; values [count], 0 .. 9).
    """
    texts: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    while len(texts) < count:
        levels = _grow(rng, block, depth, most_arguments)
        value, length = levels[-1].value, np.ones(len(levels[-1].value), np.int64)
        lengths = [length]
        for level in levels[-2::-1]:
            value, length = _fold(level, value, length)
            lengths.insert(0, length)
        chosen = np.flatnonzero((length > shortest) & (length < longest))
        if len(chosen):
            texts += _write(levels, lengths, chosen)
            answers.append(value[chosen])
    return texts[:count], np.concatenate(answers)[:count].astype(np.int32)
