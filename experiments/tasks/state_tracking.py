"""State tracking: tasks whose answers depend on all symbols so far and on their order.

Parity and modular arithmetic follow Deletang et al. (arXiv 2207.02098) and Grazzi et al. (arXiv
2411.12537): train on up to 40 symbols, test on up to 256. Word problems of groups follow Merrill et
al. (arXiv 2404.08819): after each element, the answer is the product of all elements so far.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from experiments.tasks.examples import Examples, Task

MODULUS = 5
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2  # tokens after the digits
GROUPS = ("S3", "A5", "S5")


def parity(rng: np.random.Generator, count: int, length: int) -> Examples:
    """Generate bits; the target is 1 if the number of ones so far is odd."""
    bits = rng.integers(0, 2, (count, length), dtype=np.int32)
    return Examples(bits, np.cumsum(bits, axis=1) % 2, np.ones(bits.shape, bool))


def modular_arithmetic(rng: np.random.Generator, count: int, length: int) -> Examples:
    """Generate expressions 3 + 1 * 4 - ...; the target after each digit is the value modulo 5.

    Products bind more tightly than sums. An even `length` ends with an operator.
    """
    tokens = rng.integers(0, MODULUS, (count, length), dtype=np.int32)
    tokens[:, 1::2] = rng.integers(PLUS, TIMES + 1, tokens[:, 1::2].shape)
    targets = np.zeros_like(tokens)
    total = np.zeros(count, np.int32)  # sum of the finished terms
    term = tokens[:, 0]  # current term, with its sign
    targets[:, 0] = term
    for t in range(2, length, 2):
        operator, digit = tokens[:, t - 1], tokens[:, t]
        goes_on = operator == TIMES
        total = np.where(goes_on, total, total + term) % MODULUS
        opened = np.where(operator == MINUS, -digit, digit)
        term = np.where(goes_on, term * digit, opened) % MODULUS
        targets[:, t] = (total + term) % MODULUS
    counted = np.zeros(tokens.shape, bool)
    counted[:, ::2] = True
    return Examples(tokens, targets, counted)


@functools.cache
def group(name: str) -> np.ndarray:
    """Return the multiplication table [n, n] of a permutation group; entry [a, b] is b after a."""
    kind, size = name[0], int(name[1:])
    elements = list(itertools.permutations(range(size)))
    if kind == "A":
        elements = [p for p in elements if _even(p)]
    index = {p: i for i, p in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32)


def _even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


def word_problem(name: str, rng: np.random.Generator, count: int, length: int) -> Examples:
    """Generate elements of a group; the target is their product so far."""
    table = group(name)
    tokens = rng.integers(0, len(table), (count, length), dtype=np.int32)
    targets = np.empty_like(tokens)
    targets[:, 0] = tokens[:, 0]
    for t in range(1, length):
        targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
    return Examples(tokens, targets, np.ones(tokens.shape, bool))


def make(name: str, *, train_length: int, test_lengths: tuple[int, ...], last_only: bool) -> Task:
    """Return the task `parity`, `modular_arithmetic`, `S3`, `A5` or `S5`."""
    common: dict[str, Any] = {
        "name": name,
        "train_length": train_length,
        "test_lengths": test_lengths,
        "last_only": last_only,
    }
    if name == "parity":
        return Task(**common, vocab_size=2, num_classes=2, generate=parity, shortest=3, chance=0.5)
    if name == "modular_arithmetic":
        return Task(
            **common,
            vocab_size=TIMES + 1,
            num_classes=MODULUS,
            generate=modular_arithmetic,
            shortest=3,
            step=2,
            chance=1 / MODULUS,
        )
    size = len(group(name))
    generate = functools.partial(word_problem, name)
    return Task(
        **common,
        vocab_size=size,
        num_classes=size,
        generate=generate,
        shortest=3,
        chance=1 / size,
    )
