"""State tracking: tasks whose answers depend on all symbols so far and on their order.

Sizes follow Deletang et al. (arXiv 2207.02098) and Grazzi et al. (arXiv 2411.12537): train on up to
40 symbols, test on up to 256. Most tasks are automata; modular arithmetic has its own generator.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from experiments.tasks import automata
from experiments.tasks.examples import Examples, Task

MODULUS = 5
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2  # tokens after the digits
NAMES = tuple(dict.fromkeys(["parity", "modular_arithmetic", *automata.AUTOMATA]))


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


def make(
    name: str,
    *,
    train_length: int,
    test_lengths: tuple[int, ...],
    last_only: bool,
    curriculum: int = 0,
) -> Task:
    """Return the task `modular_arithmetic`, or that of an automaton."""
    common: dict[str, Any] = {
        "name": name,
        "train_length": train_length,
        "test_lengths": test_lengths,
        "last_only": last_only,
        "curriculum": curriculum,
        "shortest": 3,
    }
    if name == "modular_arithmetic":
        return Task(
            **common,
            vocab_size=TIMES + 1,
            num_classes=MODULUS,
            generate=modular_arithmetic,
            step=2,
            chance=1 / MODULUS,
        )
    automaton = automata.AUTOMATA[name]()
    return Task(
        **common,
        vocab_size=automaton.transitions.shape[1],
        num_classes=automaton.num_classes,
        generate=functools.partial(automata.words, automaton),
        chance=1 / automaton.num_classes if automaton.balanced else None,
    )
