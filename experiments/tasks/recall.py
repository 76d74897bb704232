"""Recall tasks: reproduce earlier tokens of the sequence.

Selective copying and induction heads follow Mamba (arXiv 2312.00752, section 4.1). Passkeys follow
landmark attention (arXiv 2305.16300), needles RULER (arXiv 2404.06654). MQAR, multi-query
associative recall, is in `experiments.tasks.mqar`.
"""

from __future__ import annotations

import functools

import numpy as np

from experiments.base.errors import UserError
from experiments.tasks import mqar
from experiments.tasks.examples import Examples, Task

BLANK = 0
FILLER, DIGITS = 8, 10  # tokens of the text around needles, and of their values


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


def needles(
    rng: np.random.Generator, count: int, length: int, *, keys: int, digits: int, repeated: bool
) -> Examples:
    """Generate retrieval: a text contains keys, each followed by its digits; repeat those of one.

    Tokens 0 .. 7 are the text, repeated or random, then 10 digits, then the keys. The last `digits`
    positions are a key and its digits but the last; their targets are its digits.
    """
    text = length - digits
    slack = text - keys * (1 + digits)
    if slack < 0:
        raise UserError(
            f"{keys} keys of {digits} digits need {text - slack + digits} tokens, got {length}"
        )
    inputs = rng.integers(0, FILLER, (count, length), dtype=np.int32)
    if repeated:
        inputs[:] = np.arange(length) % FILLER
    rows = np.arange(count)[:, None]
    values = FILLER + rng.integers(0, DIGITS, (count, keys, digits), dtype=np.int32)
    names = FILLER + DIGITS + rng.permuted(np.tile(np.arange(keys), (count, 1)), axis=1)
    starts = np.sort(rng.integers(0, slack + 1, (count, keys)), axis=1)
    starts += np.arange(keys) * (1 + digits)
    inputs[rows, starts] = names
    for i in range(digits):
        inputs[rows, starts + 1 + i] = values[:, :, i]
    asked = rng.integers(0, keys, count)
    answers = values[rows[:, 0], asked]
    inputs[:, text] = names[rows[:, 0], asked]
    inputs[:, text + 1 :] = answers[:, :-1]
    targets, counted = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[:, text:] = answers
    counted[:, text:] = True
    return Examples(inputs, targets, counted)


def match_to_sample(
    rng: np.random.Generator, count: int, length: int, *, vocab_size: int
) -> Examples:
    """Generate delayed match to sample: does the last token equal the first?

    The delay has `length` - 2 distractors, tokens 0 .. 7. The items are the other tokens. Half of
    the sequences match (Yang et al., Nature Neuroscience 2019).
    """
    items = vocab_size - FILLER
    inputs = rng.integers(0, FILLER, (count, length), dtype=np.int32)
    sample, same = rng.integers(0, items, count), rng.random(count) < 0.5
    other = (sample + rng.integers(1, items, count)) % items
    inputs[:, 0] = FILLER + sample
    inputs[:, -1] = FILLER + np.where(same, sample, other)
    targets, counted = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[:, -1] = same
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


def make_needles(
    name: str, length: int, test_lengths: tuple[int, ...], keys: int, digits: int
) -> Task:
    """Return the task `passkey`, in a repeated text, or `needles`, in a random one."""
    tokens = FILLER + DIGITS + keys
    return Task(
        name=name,
        vocab_size=tokens,
        num_classes=tokens,
        generate=functools.partial(needles, keys=keys, digits=digits, repeated=name == "passkey"),
        train_length=length,
        test_lengths=test_lengths,
        chance=1 / DIGITS,
    )


def make_match(length: int, test_lengths: tuple[int, ...], vocab_size: int) -> Task:
    """Return the task of delayed match to sample."""
    return Task(
        name="match_to_sample",
        vocab_size=vocab_size,
        num_classes=2,
        generate=functools.partial(match_to_sample, vocab_size=vocab_size),
        train_length=length,
        test_lengths=test_lengths,
        chance=0.5,
    )
