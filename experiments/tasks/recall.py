"""Recall tasks: reproduce earlier tokens of the sequence.

Selective copying and induction heads follow Mamba (arXiv 2312.00752, section 4.1). MQAR,
multi-query associative recall, is in `experiments.tasks.mqar`.
"""

from __future__ import annotations

import functools

import numpy as np

from experiments.tasks import mqar
from experiments.tasks.examples import Examples, Task

BLANK = 0


def selective_copying(
    rng: np.random.Generator, count: int, length: int, *, vocab_size: int, data_tokens: int
) -> Examples:
    """Generate selective copying: repeat data tokens that are scattered among blanks, in order.

    Token 0 is the blank, tokens 1 .. vocab_size - 2 are data, and vocab_size - 1 is the marker. The
    first `length` positions contain the data. One marker per data token follows.
    """
    marker = vocab_size - 1
    places = np.argsort(rng.random((count, length)), axis=1)[:, :data_tokens]
    places.sort(axis=1)
    data = rng.integers(1, marker, (count, data_tokens), dtype=np.int32)
    inputs = np.full((count, length + data_tokens), BLANK, np.int32)
    np.put_along_axis(inputs, places, data, axis=1)
    inputs[:, length:] = marker
    targets = np.zeros_like(inputs)
    targets[:, length:] = data
    counted = np.zeros(inputs.shape, bool)
    counted[:, length:] = True
    return Examples(inputs, targets, counted)


def induction_heads(
    rng: np.random.Generator, count: int, length: int, *, vocab_size: int
) -> Examples:
    """Generate induction heads: a special token occurs twice; predict what followed the first.

    The other tokens are random. Tokens are 0 .. vocab_size - 2 and the special one,
    vocab_size - 1, whose second occurrence is at the end.
    """
    special = vocab_size - 1
    inputs = rng.integers(0, special, (count, length), dtype=np.int32)
    first = rng.integers(0, length - 2, count)
    rows = np.arange(count)
    inputs[rows, first] = special
    inputs[:, -1] = special
    targets = np.zeros_like(inputs)
    targets[:, -1] = inputs[rows, first + 1]
    counted = np.zeros(inputs.shape, bool)
    counted[:, -1] = True
    return Examples(inputs, targets, counted)


def make_copying(length: int, vocab_size: int = 16, data_tokens: int = 16) -> Task:
    """Return the task of selective copying over `length` positions."""
    generate = functools.partial(selective_copying, vocab_size=vocab_size, data_tokens=data_tokens)
    return Task(
        name="selective_copying",
        vocab_size=vocab_size,
        num_classes=vocab_size,
        generate=generate,
        train_length=length,
        test_lengths=(length,),
        chance=1 / (vocab_size - 2),
    )


def make_induction(length: int, test_lengths: tuple[int, ...], vocab_size: int = 16) -> Task:
    """Return the task of induction heads, with one training length and several test lengths."""
    return Task(
        name="induction_heads",
        vocab_size=vocab_size,
        num_classes=vocab_size,
        generate=functools.partial(induction_heads, vocab_size=vocab_size),
        train_length=length,
        test_lengths=test_lengths,
        chance=1 / (vocab_size - 1),
    )


def make_mqar(length: int, pairs: int, vocab_size: int) -> Task:
    """Return the task of multi-query associative recall."""

    def generate(rng: np.random.Generator, count: int, length: int) -> Examples:
        inputs, targets = mqar.mqar(rng, count, length, pairs, vocab_size)
        counted = targets != mqar.NO_TARGET
        return Examples(inputs, np.where(counted, targets, 0), counted)

    return Task(
        name="mqar",
        vocab_size=vocab_size,
        num_classes=vocab_size,
        generate=generate,
        train_length=length,
        test_lengths=(length,),
        chance=2 / vocab_size,
    )
