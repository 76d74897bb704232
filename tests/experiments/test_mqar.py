"""MQAR: every example follows the rules of the paper."""

import doctest

import numpy as np
import pytest

from experiments.base.errors import UserError
from experiments.tasks import mqar as module
from experiments.tasks.mqar import NO_TARGET, mqar


def slow_example(rng, length, pairs, vocab_size, power):
    """Return an example, generated directly from the rules."""
    half = vocab_size // 2
    keys = rng.choice(np.arange(1, half), pairs, replace=False)
    values = rng.choice(np.arange(half, vocab_size), pairs, replace=False)
    tokens = [int(rng.integers(vocab_size)) for _ in range(length)]
    targets = [NO_TARGET] * length
    slots = list(range((length - 2 * pairs) // 2))
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        tokens[2 * i], tokens[2 * i + 1] = int(key), int(value)
        weights = np.array([(slot + 1.0) ** (power - 1) for slot in slots])
        slot = slots.pop(rng.choice(len(slots), p=weights / weights.sum()))
        tokens[2 * pairs + 2 * slot] = int(key)
        targets[2 * pairs + 2 * slot] = int(value)
    return tokens, targets


def check(tokens, targets, length, pairs, vocab_size):
    half = vocab_size // 2
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < half for key in keys)
    assert all(half <= value < vocab_size for value in values)
    asked = [i for i in range(length) if targets[i] != NO_TARGET]
    assert sorted(tokens[i] for i in asked) == sorted(keys)
    memory = dict(zip(keys, values, strict=True))
    for i in asked:
        assert i >= 2 * pairs
        assert i % 2 == 0
        assert targets[i] == memory[tokens[i]]
    assert all(0 <= token < vocab_size for token in tokens)


@pytest.mark.parametrize(
    ("length", "pairs", "vocab_size"), [(64, 4, 8192), (8, 2, 6), (256, 64, 256)]
)
def test_examples_keep_the_rules(length, pairs, vocab_size):
    rng = np.random.default_rng(0)
    inputs, targets = mqar(rng, 20, length, pairs, vocab_size)
    assert inputs.shape == targets.shape == (20, length)
    assert inputs.dtype == targets.dtype == np.int32
    for tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        check(tokens, wanted, length, pairs, vocab_size)
    tokens, wanted = slow_example(rng, length, pairs, vocab_size, 0.01)
    check(tokens, wanted, length, pairs, vocab_size)


def statistics(inputs, targets, pairs, vocab_size):
    """Return the frequencies of tokens at some positions and of the positions of questions."""
    inputs, targets = np.array(inputs), np.array(targets)
    columns = [np.bincount(inputs[:, i], minlength=vocab_size) for i in (0, 1, 2 * pairs - 2, -1)]
    where = [(inputs == inputs[:, [2 * i]]) & (targets >= 0) for i in (0, pairs - 1)]
    return np.concatenate([*columns, *(w.sum(axis=0) for w in where)]) / len(inputs)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_distributions_are_those_of_the_slow_version(power):
    length, pairs, vocab_size, count = 24, 3, 12, 4000
    fast = mqar(np.random.default_rng(1), count, length, pairs, vocab_size, power)
    rng = np.random.default_rng(2)
    examples = [slow_example(rng, length, pairs, vocab_size, power) for _ in range(count)]
    slow = zip(*examples, strict=True)
    a, b = statistics(*fast, pairs, vocab_size), statistics(*slow, pairs, vocab_size)
    # Two frequencies from n draws each differ by more than 5 sqrt(2 p (1 - p) / n) by luck once in
    # 1.7 million; the seeds are fixed.
    p = (a + b) / 2
    assert np.all(np.abs(a - b) <= 5 * np.sqrt(2 * p * (1 - p) / count) + 1e-12)


def test_the_seed_decides():
    first, again, other = (mqar(np.random.default_rng(s), 3, 64, 8) for s in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert np.any(first[0] != other[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 63, "pairs": 4}, "length even and at least 4"),
        ({"length": 12, "pairs": 4}, "length even and at least 4"),
        ({"length": 64, "pairs": 0}, "pairs must be at least 1"),
        ({"length": 64, "pairs": 4, "vocab_size": 8}, "vocab_size must be even"),
        ({"length": 64, "pairs": 4, "vocab_size": 31}, "vocab_size must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        mqar(np.random.default_rng(0), 2, **sizes)


def test_example():
    assert doctest.testmod(module).failed == 0
