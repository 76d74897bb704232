"""Multi-query associative recall (MQAR): store key-value pairs, then answer repeated keys."""

from __future__ import annotations

import numpy as np

from experiments.base.errors import UserError

NO_TARGET = -1


def mqar(
    rng: np.random.Generator,
    batch_size: int,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw examples of MQAR as in zoology (Arora et al., arXiv 2312.04927).

        k_1 v_1 k_2 v_2 ... k_P v_P   . . k_2 . . . k_P . . k_1 . .

    An example has P distinct keys from 1 .. V/2 - 1 and P distinct values from V/2 .. V - 1. After
    the pairs, every key is repeated once, at the start of a slot of two positions. Slots
    i = 1, 2, ... are drawn without replacement with probability proportional to i^(power - 1), so
    that most keys are repeated early. The target at a repeated key is its value. No other position
    has a target. All other positions contain tokens drawn from 0 .. V - 1.

    Args:
      rng: the only source of randomness.

      batch_size: number of examples B.

      length: positions T, even and at least 4 P.

      pairs: number of pairs P.

      vocab_size: number of tokens V, even.

      power: exponent of the slots' probabilities; 1 draws them uniformly.

    Returns:
      (inputs, targets), both int32 [B, T]; targets are `NO_TARGET` where there is no question.

    Raises:
      UserError: if the sizes are invalid.

    Example:
      >>> inputs, targets = mqar(np.random.default_rng(0), 1, length=16, pairs=2, vocab_size=16)
      >>> inputs.shape, (targets != NO_TARGET).sum(axis=1).tolist()
      ((1, 16), [2])
    """
    if min(batch_size, pairs) < 1 or length % 2 or length < 4 * pairs:
        raise UserError(
            f"mqar: batch_size and pairs must be at least 1, and length even and at least 4 *"
            f" pairs, got batch_size={batch_size}, length={length}, pairs={pairs}"
        )
    half = vocab_size // 2
    if vocab_size % 2 or half - 1 < pairs:
        raise UserError(
            f"mqar: vocab_size must be even and at least 2 * (pairs + 1), got"
            f" vocab_size={vocab_size}, pairs={pairs}"
        )
    rows = np.arange(batch_size)[:, None]
    keys = 1 + _distinct(rng, batch_size, half - 1, pairs)
    values = half + _distinct(rng, batch_size, half, pairs)
    inputs = rng.integers(0, vocab_size, (batch_size, length), dtype=np.int32)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    slots = (length - 2 * pairs) // 2
    returns = 2 * pairs + 2 * _weighted(rng, batch_size, slots, pairs, power)
    inputs[rows, returns] = keys
    targets = np.full((batch_size, length), NO_TARGET, np.int32)
    targets[rows, returns] = values
    return inputs, targets


def _distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> np.ndarray:
    """Draw `count` distinct numbers below `choices` in every row, in random order.

    Floyd's algorithm for all rows at once: the memory depends on `count`, not on `choices`.
    """
    drawn = np.full((rows, count), -1)
    for i, top in enumerate(range(choices - count, choices)):
        number = rng.integers(0, top + 1, rows)
        taken = (drawn == number[:, None]).any(axis=1)
        drawn[:, i] = np.where(taken, top, number)
    return rng.permuted(drawn, axis=1)


def _weighted(
    rng: np.random.Generator, rows: int, choices: int, count: int, power: float
) -> np.ndarray:
    """Draw `count` distinct numbers i < choices in every row, weighted by (i + 1)^(power - 1).

    Sorting by log weight plus Gumbel noise is equivalent to successive draws without replacement.
    """
    score = (power - 1) * np.log(np.arange(1, choices + 1)) + rng.gumbel(size=(rows, choices))
    return np.argsort(-score, axis=1)[:, :count]
