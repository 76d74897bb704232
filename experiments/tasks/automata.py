"""Finite automata: random words, and an answer after each symbol that the state determines.

Regular languages follow Deletang et al. (arXiv 2207.02098) and Fan et al. (arXiv 2309.07412), word
problems of groups Merrill et al. (arXiv 2404.08819), flip-flops Liu et al. (arXiv 2306.00946),
star-free and bounded-depth languages Bhattamishra et al. (arXiv 2009.11264).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from experiments.tasks.examples import Examples

GROUPS = ("S3", "S4", "A5", "S5")


class Automaton(NamedTuple):
    """A deterministic automaton, which starts in state 0.

    Attributes:
      transitions: [states, symbols] int32, the next state.

      labels: [states] int32, the answer in each state.

      weights: [states, symbols], relative frequencies of the symbols that follow, 0 if illegal; by
        default all symbols are equally frequent.

      balanced: whether all answers are equally frequent in long words.
    """

    transitions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    balanced: bool = True

    @property
    def num_classes(self) -> int:
        """Return the number of answers."""
        return int(self.labels.max()) + 1


def words(automaton: Automaton, rng: np.random.Generator, count: int, length: int) -> Examples:
    """Generate random words; the target after each symbol is the label of the state."""
    transitions, labels, weights, _ = automaton
    symbols = transitions.shape[1]
    tokens = rng.integers(0, symbols, (count, length), dtype=np.int32)
    if weights is not None:
        cumulative = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    state = np.zeros(count, np.int32)
    targets = np.empty_like(tokens)
    for t in range(length):
        if weights is not None:
            tokens[:, t] = (rng.random((count, 1)) >= cumulative[state]).sum(axis=1)
        state = transitions[state, tokens[:, t]]
        targets[:, t] = labels[state]
    return Examples(tokens, targets, np.ones(tokens.shape, bool))


def cycle(modulus: int, moves: Sequence[int]) -> Automaton:
    """Return moves on a cycle; the answer is the position."""
    positions = np.arange(modulus, dtype=np.int32)
    return Automaton((positions[:, None] + np.array(moves, np.int32)) % modulus, positions)


def even_pairs() -> Automaton:
    """Return the bits with an even number of pairs 01 and 10: the first bit equals the last."""
    first_and_last = np.array([[1 + 3 * bit for bit in (0, 1)]])  # state 1 + 2 first + last
    rest = [[1 + 2 * first + bit for bit in (0, 1)] for first in (0, 1) for _ in (0, 1)]
    transitions = np.vstack([first_and_last, rest]).astype(np.int32)
    return Automaton(transitions, np.array([1, 1, 0, 0, 1], np.int32))


def flip_flop(written: float = 0.1) -> Automaton:
    """Return a bit that two symbols write, with a probability; the third symbol leaves it."""
    transitions = np.array([[0, 1, 0], [0, 1, 1]], np.int32)
    weights = np.tile([written / 2, written / 2, 1 - written], (2, 1))
    return Automaton(transitions, np.arange(2, dtype=np.int32), weights)


def brackets(kinds: int, depth: int) -> Automaton:
    """Return nested brackets of several kinds, at most `depth` deep; the answer is the legal set.

    Symbols are the opening brackets, then the closing ones; a word opens and closes equally often.
    One kind gives the star-free languages D_n = (a D_(n-1) b)*, several kinds give Dyck languages
    of bounded depth.
    """
    stacks = [s for n in range(depth + 1) for s in itertools.product(range(kinds), repeat=n)]
    index = {stack: i for i, stack in enumerate(stacks)}
    transitions = np.zeros((len(stacks), 2 * kinds), np.int32)
    weights = np.zeros((len(stacks), 2 * kinds))
    for stack, i in index.items():
        if len(stack) < depth:
            transitions[i, :kinds] = [index[*stack, kind] for kind in range(kinds)]
            weights[i, :kinds] = 1 / kinds
        if stack:
            transitions[i, kinds + stack[-1]] = index[stack[:-1]]
            weights[i, kinds + stack[-1]] = 1
    _, labels = np.unique(weights > 0, axis=0, return_inverse=True)
    labels = labels.reshape(-1).astype(np.int32)  # numpy 2.0 alone returns a column
    return Automaton(transitions, labels, weights, balanced=False)


@functools.cache
def group(name: str) -> np.ndarray:
    """Return the multiplication table [n, n] of a permutation group; entry [a, b] is b after a.

    Element 0 is the identity.
    """
    kind, size = name[0], int(name[1:])
    elements = list(itertools.permutations(range(size)))
    if kind == "A":
        elements = [p for p in elements if _even(p)]
    index = {p: i for i, p in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32)


def _even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


def word_problem(name: str) -> Automaton:
    """Return the elements of a group; the answer is their product so far."""
    table = group(name)
    return Automaton(table, np.arange(len(table), dtype=np.int32))


AUTOMATA: Mapping[str, Callable[[], Automaton]] = MappingProxyType(
    {
        "parity": lambda: cycle(2, (0, 1)),
        **{name: functools.partial(word_problem, name) for name in GROUPS},
        "sum": lambda: cycle(5, range(5)),
        "cycle_navigation": lambda: cycle(5, (0, 1, -1)),
        "even_pairs": even_pairs,
        "flip_flop": flip_flop,
        "star_free": lambda: brackets(kinds=1, depth=4),
        "dyck": lambda: brackets(kinds=2, depth=8),
    }
)
"""Automata by the name that configurations use."""
