"""Tasks of in-context learning: each sequence has its own language or function.

Languages follow Akyurek et al. (arXiv 2401.12973), linear functions Garg et al. (arXiv 2208.01066).
"""

from __future__ import annotations

import functools

import numpy as np

from experiments.tasks.examples import Examples, Task

STATES, EDGES, WORD = (4, 12), (1, 4), (1, 50)  # ranges, both ends included
END = 0  # token after each word


def languages(rng: np.random.Generator, count: int, length: int, *, symbols: int) -> Examples:
    """Generate words of one random automaton per sequence; the target is the next symbol.

    An automaton has 4 to 12 states with 1 to 4 edges each, equally probable, and words have 1 to 50
    symbols. The ends of words, token 0, are random and do not count.
    """
    rows, widest = np.arange(count), EDGES[1]
    states = rng.integers(STATES[0], STATES[1] + 1, count)
    goals = (rng.random((count, STATES[1], widest)) * states[:, None, None]).astype(np.int32)
    letters = np.argsort(rng.random((count, STATES[1], symbols)), axis=2)[:, :, :widest] + 1
    edges = rng.integers(EDGES[0], EDGES[1] + 1, (count, STATES[1]))
    tokens = np.empty((count, length + 1), np.int32)
    state, left = np.zeros(count, np.int32), rng.integers(WORD[0], WORD[1] + 1, count)
    for t in range(length + 1):
        edge = (rng.random(count) * edges[rows, state]).astype(np.int32)
        ends = left == 0
        tokens[:, t] = np.where(ends, END, letters[rows, state, edge])
        state = np.where(ends, 0, goals[rows, state, edge])
        left = np.where(ends, rng.integers(WORD[0], WORD[1] + 1, count), left - 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return Examples(inputs, targets, targets != END)


def linear_functions(
    rng: np.random.Generator, count: int, length: int, *, features: int
) -> Examples:
    """Generate y_t = w . x_t, with one w per sequence; all numbers of w and x are standard normal.

    Inputs are x_t and y_{t-1}, which is 0 at first: [count, length, features + 1]. Targets are y_t.
    """
    x = rng.standard_normal((count, length, features), np.float32)
    w = rng.standard_normal((count, features), np.float32)
    y = np.einsum("btf,bf->bt", x, w)
    before = np.pad(y[:, :-1], ((0, 0), (1, 0)))
    inputs = np.concatenate([x, before[..., None]], axis=2)
    return Examples(inputs, y, np.ones(y.shape, bool))


def least_squares(inputs: np.ndarray, targets: np.ndarray, seen: int) -> float:
    """Return the mean squared error of w of least norm, from the first `seen` examples."""
    x = inputs[..., :-1].astype(np.float64)
    w = np.linalg.pinv(x[:, :seen]) @ targets[:, :seen, None]
    return float(np.square((x[:, seen] * w[..., 0]).sum(axis=1) - targets[:, seen]).mean())


def make_languages(length: int, test_lengths: tuple[int, ...], symbols: int) -> Task:
    """Return the task of in-context language learning."""
    return Task(
        name="languages",
        vocab_size=symbols + 1,
        num_classes=symbols + 1,
        generate=functools.partial(languages, symbols=symbols),
        train_length=length,
        test_lengths=test_lengths,
    )


def make_functions(length: int, features: int) -> Task:
    """Return the task of in-context linear regression; `vocab_size` is the number of inputs."""
    return Task(
        name="linear_functions",
        vocab_size=features + 1,
        num_classes=1,
        generate=functools.partial(linear_functions, features=features),
        train_length=length,
        test_lengths=(length,),
    )
