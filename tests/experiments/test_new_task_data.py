"""Automata, retrieval, in-context tasks and Pathfinder against direct implementations."""

import collections
import itertools
import re

import numpy as np
import pytest

from experiments.base.errors import UserError
from experiments.configs import recall as recall_config
from experiments.objectives import protocol
from experiments.tasks import (
    automata,
    batches,
    examples,
    in_context,
    labelled,
    pathfinder,
    recall,
    state_tracking,
)


def rng():
    return np.random.default_rng(0)


def legal_brackets(word, kinds, depth):
    """Return the set of symbols that may follow, after a check of the word with a stack."""
    stack = []
    for symbol in word:
        if symbol < kinds:
            stack.append(symbol)
        else:
            assert stack.pop() == symbol - kinds
        assert len(stack) <= depth
    opening = set(range(kinds)) if len(stack) < depth else set()
    return frozenset(opening | ({kinds + stack[-1]} if stack else set()))


def flip_flop(word):
    written = [symbol for symbol in word if symbol < 2]
    return written[-1] if written else 0


DIRECT = {
    "parity": lambda word: word.count(1) % 2,
    "sum": lambda word: sum(word) % 5,
    "cycle_navigation": lambda word: (word.count(1) - word.count(2)) % 5,
    "even_pairs": lambda word: len(re.findall("(?=01|10)", "".join(map(str, word)))) % 2 == 0,
    "flip_flop": flip_flop,
    "star_free": lambda word: legal_brackets(word, 1, 4),
    "dyck": lambda word: legal_brackets(word, 2, 8),
}


@pytest.mark.parametrize("name", [n for n in automata.AUTOMATA if n not in automata.GROUPS])
def test_automata_give_the_answers(name):
    automaton = automata.AUTOMATA[name]()
    inputs, targets, counted = automata.words(automaton, rng(), 8, 60)
    assert counted.all()
    assert inputs.dtype == targets.dtype == np.int32
    answers = {}  # the answer of each label: labels name answers one to one
    for word, said in zip(inputs.tolist(), targets.tolist(), strict=True):
        for t in range(60):
            answer = DIRECT[name](word[: t + 1])
            assert answers.setdefault(said[t], answer) == answer
    assert len(set(answers.values())) == len(answers) == automaton.num_classes
    assert set(inputs.flat) == set(range(automaton.transitions.shape[1]))
    if name == "flip_flop":
        assert 0.05 < (inputs < 2).mean() < 0.15
    if name in ("parity", "sum", "cycle_navigation", "even_pairs"):
        assert answers == {label: label for label in range(automaton.num_classes)}
    task = state_tracking.make(name, train_length=9, test_lengths=(12,), last_only=False)
    assert (task.chance is None) == (name in ("star_free", "dyck"))


def test_a_curriculum_fills_rows_with_sequences_that_grow():
    task = state_tracking.make(
        "S4", train_length=40, test_lengths=(40,), last_only=False, curriculum=2560
    )
    source, table = examples.Source(task, seed=0), automata.group("S4")
    lengths = []
    for block in range(10):
        row = source[block * 256]
        sizes = collections.Counter(row["segment_ids"].tolist())
        (length,) = set(sizes.values())
        lengths.append(length)
        assert len(row["inputs"]) == 40 // length * length
        assert row["counted"].all()
        for start in range(0, len(row["inputs"]), length):
            product = 0
            for t in range(start, start + length):
                product = table[product, row["inputs"][t]]
                assert row["targets"][t] == product
    assert lengths[0] == 3
    assert lengths == sorted(lengths)
    assert 25 < lengths[-1] < 40
    assert source[2560]["segment_ids"].max() == 1
    batch = next(batches.of_task(task, batch_size=4, seed=0))
    assert batch["inputs"].shape == (4, 40)
    assert batch["segment_ids"][:, -1].tolist() == [0] * 4  # 13 sequences of 3 leave one position
    assert not batch["counted"][:, -1].any()
    with pytest.raises(UserError, match="both set"):
        batches.of_task(task, batch_size=4, seed=0, packed_length=80)
    with pytest.raises(ValueError, match="needs sequences of several lengths"):
        examples.Task("x", 2, 2, task.generate, 8, (8,), curriculum=256)


def test_a_curriculum_of_last_answers_counts_one_per_sequence():
    task = state_tracking.make(
        "modular_arithmetic", train_length=39, test_lengths=(39,), last_only=True, curriculum=2560
    )
    for index in (0, 1500, 2559):
        row = examples.Source(task, seed=1)[index]
        ends = np.flatnonzero(np.diff(row["segment_ids"], append=0))
        assert np.flatnonzero(row["counted"]).tolist() == ends.tolist()
        assert len(row["inputs"]) // len(ends) % 2 == 1  # sequences end with a digit


@pytest.mark.parametrize("repeated", [False, True])
def test_needles_are_in_the_text(repeated):
    inputs, targets, counted = recall.needles(rng(), 50, 40, keys=3, digits=4, repeated=repeated)
    starts = set()
    for row, said, asked in zip(inputs.tolist(), targets.tolist(), counted.tolist(), strict=True):
        assert asked == [False] * 36 + [True] * 4
        places = [t for t in range(36) if row[t] >= 18]
        assert sorted(row[t] for t in places) == [18, 19, 20]
        (place,) = [t for t in places if row[t] == row[36]]
        assert row[place + 1 : place + 5] == said[36:] == [*row[37:], said[-1]]
        assert all(8 <= token < 18 for token in said[36:])
        inside = {t + i for t in places for i in range(5)}
        text = [(t, row[t]) for t in range(36) if t not in inside]
        assert all(token < 8 for _, token in text)
        if repeated:
            assert all(token == t % 8 for t, token in text)
        starts.add(places[0])
    assert len(starts) > 5
    with pytest.raises(UserError, match="3 keys of 4 digits need 19 tokens, got 18"):
        recall.needles(rng(), 1, 18, keys=3, digits=4, repeated=False)
    assert recall.needles(rng(), 1, 19, keys=3, digits=4, repeated=False).inputs.shape == (1, 19)


def test_half_of_the_samples_match():
    inputs, targets, counted = recall.match_to_sample(rng(), 400, 7, vocab_size=12)
    assert ((inputs[:, 0] == inputs[:, -1]) == targets[:, -1]).all()
    assert 0.4 < targets[:, -1].mean() < 0.6
    assert (inputs[:, [0, -1]] >= 8).all()
    assert (inputs[:, 1:-1] < 8).all()
    assert counted.sum(axis=0).tolist() == [0] * 6 + [400]


def test_words_of_a_language_follow_one_automaton():
    inputs, targets, counted = in_context.languages(rng(), 6, 400, symbols=18)
    assert (targets[:, :-1] == inputs[:, 1:]).all()
    assert (counted == (targets != in_context.END)).all()
    for row in inputs:
        ends = np.flatnonzero(row == in_context.END)
        words = [row[a + 1 : b] for a, b in zip([-1, *ends], [*ends, 400], strict=False)]
        assert max(map(len, words)) <= 50
        # All words start in one state, which has at most four symbols.
        assert len({int(word[0]) for word in words if len(word)}) <= 4
        # Twelve states of four edges at most: pairs of symbols repeat.
        pairs = {(int(a), int(b)) for w in words for a, b in itertools.pairwise(w)}
        assert len(pairs) <= 12 * 16


def test_linear_functions_have_their_best_solution():
    inputs, targets, _ = in_context.linear_functions(rng(), 200, 9, features=4)
    assert inputs.shape == (200, 9, 5)
    assert (inputs[:, 1:, -1] == targets[:, :-1]).all()
    for row, said in zip(inputs[:5], targets[:5], strict=True):
        w = np.linalg.solve(row[:4, :4].astype(float), said[:4])
        np.testing.assert_allclose(row[:, :4] @ w, said, atol=2e-3)
    assert in_context.least_squares(inputs, targets, 0) == pytest.approx(
        np.square(targets[:, 0]).mean(), rel=1e-4
    )
    # Half of the features are known: half of the mean square, 4, is left.
    assert in_context.least_squares(inputs, targets, 2) == pytest.approx(2, rel=0.3)
    assert in_context.least_squares(inputs, targets, 8) < 1e-6


def test_regression_is_evaluated_against_least_squares():
    objective = protocol.make(recall_config.get_config("linear_functions,lru,quicktest"))

    class Zero:
        def apply(self, params, inputs):
            return params * inputs[..., :1], None

    objective.model = Zero()
    result = objective.make_evaluate(None)(0.0, True)
    assert result["test_sequences"] == 8
    assert 0.2 < result["error"] == result["error_8"] < 5
    assert result["least_squares_8"] < 1e-6
    assert objective.lower_is_better


def test_pathfinder_connects_what_it_says(monkeypatch):
    monkeypatch.setattr(pathfinder, "GAP", 0)  # a whole curve is connected, pixel by pixel
    images, labels = pathfinder.generate(rng(), 24)
    assert images.shape == (24, 1024, 1)
    assert images.dtype == np.float32
    assert set(np.unique(images)) == {np.float32(0), np.float32(0.6), np.float32(1)}
    assert 4 < labels.sum() < 20
    for image, label in zip(images.reshape(24, 32, 32), labels, strict=True):
        assert (image == 1).sum() in (17, 18)  # two discs of nine pixels, perhaps overlapping
        assert connected(image) == bool(label)
    data = labelled.path_finder(6, 4, seed=0, size=32, distractors=2)
    assert (data.num_classes, data.input_dim, len(data.test.labels)) == (2, 1, 4)


def connected(image):
    """Return whether a path of neighboring pixels connects the discs."""
    pixels = {tuple(map(int, p)) for p in np.argwhere(image > 0)}
    discs = [tuple(map(int, p)) for p in np.argwhere(image == 1)]
    seen, new = set(), [discs[0]]
    while new:
        row, column = new.pop()
        if (row, column) in seen:
            continue
        seen.add((row, column))
        new += [p for p in pixels - seen if max(abs(p[0] - row), abs(p[1] - column)) == 1]
    return set(discs) <= seen
