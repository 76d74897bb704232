"""Tasks: every vectorized generator against a slow, direct implementation."""

import re

import numpy as np
import pytest

from experiments.base.errors import UserError
from experiments.tasks import automata, examples, labelled, listops, recall, state_tracking


def rng():
    return np.random.default_rng(0)


def test_parity_counts():
    parity = automata.AUTOMATA["parity"]()
    inputs, targets, counted = automata.words(parity, rng(), 5, 40)
    for row, said in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert said == [sum(row[: t + 1]) % 2 for t in range(40)]
    assert counted.all()
    assert 0.3 < inputs.mean() < 0.7


def test_modular_arithmetic_is_what_python_says():
    inputs, targets, counted = state_tracking.modular_arithmetic(rng(), 20, 41)
    symbols = "01234+-*"
    for row, said, asked in zip(inputs, targets, counted, strict=True):
        text = "".join(symbols[token] for token in row)
        assert re.fullmatch(r"[0-4]([-+*][0-4])*", text)
        for t in range(0, 41, 2):
            assert said[t] == eval(text[: t + 1]) % 5, text[: t + 1]
        assert asked[::2].all()
        assert not asked[1::2].any()
    assert set(np.unique(inputs)) == set(range(8))


@pytest.mark.parametrize(("name", "size"), [("S3", 6), ("S4", 24), ("A5", 60), ("S5", 120)])
def test_groups_are_groups(name, size):
    table = automata.group(name)
    elements = np.arange(size)
    assert table.shape == (size, size)
    assert all(set(row) == set(elements) for row in table)
    identity = [e for e in elements if (table[e] == elements).all()]
    assert len(identity) == 1
    a, b, c = rng().integers(0, size, (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table != table.T).any()


def test_word_problems_multiply():
    inputs, targets, _ = automata.words(automata.word_problem("S5"), rng(), 4, 30)
    table = automata.group("S5")
    for row, said in zip(inputs, targets, strict=True):
        product = row[0]
        for element, answer in zip(row[1:], said[1:], strict=True):
            product = table[product, element]
            assert answer == product


def test_selective_copying_copies_in_order():
    inputs, targets, counted = recall.selective_copying(rng(), 10, 50, vocab_size=8, data_tokens=6)
    for row, said, asked in zip(inputs, targets, counted, strict=True):
        data = [token for token in row[:50] if token != recall.BLANK]
        assert len(data) == 6
        assert set(data) <= set(range(1, 7))
        assert row[50:].tolist() == [7] * 6
        assert said[asked].tolist() == data
        assert not asked[:50].any()
    assert len({tuple(row) for row in inputs.tolist()}) == 10


def test_induction_heads_ask_for_what_followed():
    inputs, targets, counted = recall.induction_heads(rng(), 200, 12, vocab_size=5)
    places = set()
    for row, said, asked in zip(inputs.tolist(), targets.tolist(), counted.tolist(), strict=True):
        place = row.index(4)
        places.add(place)
        assert row.count(4) == 2
        assert row[-1] == 4
        assert said[-1] == row[place + 1]
        assert asked == [False] * 11 + [True]
    assert places == set(range(10))


def evaluated(tokens):
    """Evaluate a ListOps expression with a stack and check its syntax."""
    functions = {10: min, 11: max, 12: lambda x: int(np.median(x)), 13: lambda x: sum(x) % 10}
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < 14:
            stack.append([token])
        else:
            operator, *arguments = stack.pop()
            assert 2 <= len(arguments) <= 10
            stack[-1].append(functions[operator](arguments))
    assert len(stack) == len(stack[0]) == 1
    return stack[0][0]


def test_list_operations_have_their_value():
    texts, answers = listops.generate(rng(), 60, depth=6, shortest=20, longest=200, block=1000)
    assert [evaluated(text.tolist()) for text in texts] == answers.tolist()
    assert all(20 < len(text) < 200 for text in texts)
    assert len(texts) == len(answers) == 60
    nesting = [np.max(np.cumsum((t >= 10) * 1 - 2 * (t == 14))) for t in texts]
    assert max(nesting) == 5  # five operations above the digits of the sixth level


def slow_list_operations(generator, depth, most, level=1):
    """Generate ListOps with the recursion of the Long Range Arena."""
    if level >= depth or generator.random() > listops.OPERATION_PROBABILITY:
        return [generator.integers(10)]
    arguments = [
        slow_list_operations(generator, depth, most, level + 1)
        for _ in range(generator.integers(2, most + 1))
    ]
    operator = listops.FIRST_OPERATOR + generator.integers(4)
    return [operator, *(token for part in arguments for token in part), listops.END]


def test_list_operations_are_distributed_as_by_recursion():
    texts, _ = listops.generate(rng(), 4000, depth=4, shortest=0, longest=10**6, block=4000)
    slow = rng()
    others = [slow_list_operations(slow, 4, 10) for _ in range(4000)]
    for statistic in (len, lambda text: len(text) == 1, lambda text: np.sum(np.equal(text, 12))):
        ours, theirs = (np.array([float(statistic(t)) for t in s]) for s in (texts, others))
        spread = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
        assert abs(ours.mean() - theirs.mean()) < 4 * spread


def test_training_sequences_are_those_of_the_seed():
    task = state_tracking.make(
        "modular_arithmetic", train_length=9, test_lengths=(21,), last_only=True
    )
    source = examples.Source(task, seed=3)
    again = examples.Source(task, seed=3)
    lengths = set()
    for index in (0, 5, 255, 256, 1000):
        first, second = source[index], again[index]
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        assert first["counted"].sum() == 1
        assert first["counted"][-1]
    for index in range(100):
        lengths.add(len(source[index]["inputs"]))
    assert lengths == {3, 5, 7, 9}
    other = examples.Source(task, seed=4)
    assert any((source[i]["inputs"][:3] != other[i]["inputs"][:3]).any() for i in range(5))
    held = examples.test_examples(task, 3, 21, 50)
    assert held.inputs.shape == (50, 21)
    assert (held.counted.sum(axis=1) == 1).all()


def test_packages_share_no_file():
    data = labelled.packages(length=256, classes=3, seed=0)
    for split in (data.train, data.test):
        assert len(split.inputs) == len(split.labels) > 30
        assert len(set(np.bincount(split.labels))) == 1
    seen = {text.tobytes() for text in data.train.inputs}
    assert not any(text.tobytes() in seen for text in data.test.inputs)
    assert data.majority() == pytest.approx(1 / 3)


def test_digits_are_split():
    pytest.importorskip("sklearn")
    data = labelled.digits(seed=0)
    assert len(data.train.labels) + len(data.test.labels) == 1797
    assert data.train.inputs.shape[1:] == (64, 1)
    assert 0.05 < data.majority() < 0.2


def test_images_are_pixels_in_a_row():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        data = labelled.images("cifar10", "")
        assert (data.num_classes, data.input_dim, len(data.train.labels)) == (10, 3, 4)
        pixels = data.test.inputs[0]
        assert (pixels.shape, pixels.dtype) == ((32 * 32, 3), np.float32)
        assert 0 <= pixels.min() < pixels.max() <= 1
        with pytest.raises(UserError, match="has no image"):
            labelled.images("imdb_reviews", "")
    with pytest.raises(UserError, match=r"config\.task\.tfds: mnist"):
        labelled.images("", "")
    with pytest.raises(UserError, match=r"config\.task\.tfds='mnst'.*did you mean 'mnist'"):
        labelled.images("mnst", "")


SERIES = """# made by hand
@problemName Tiny
@timeStamps false
@univariate false
@classLabel true up down
@data
1,2,3:0,0,?:up
3,2:1,1:down
"""


def test_ts_files_are_read(tmp_path):
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"Tiny_{split}.ts").write_text(SERIES)
    series, labels = labelled.read_ts(tmp_path / "Tiny_TRAIN.ts")
    np.testing.assert_array_equal(series[0], [[1, 0], [2, 0], [3, np.nan]])
    assert [x.shape for x in series] == [(3, 2), (2, 2)]
    assert labels == ["up", "down"]
    data = labelled.time_series(str(tmp_path))
    assert data.num_classes == data.input_dim == 2
    assert data.train.labels.tolist() == [1, 0]
    everything = np.concatenate(data.train.inputs)
    np.testing.assert_allclose(everything.mean(axis=0), 0, atol=0.1)
    assert everything[2, 1] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2:a", "no line '@data'"),
        (SERIES.replace("timeStamps false", "timeStamps true"), "time stamps"),
        (SERIES.replace("@classLabel true up down", "@classLabel false"), "no class labels"),
        (SERIES.replace("3,2:1,1", "3,x:1,1"), "series 2 cannot be read"),
    ],
)
def test_bad_ts_files_end_with_one_line(tmp_path, text, words):
    path = tmp_path / "Bad_TRAIN.ts"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        labelled.read_ts(path)


def test_unknown_series_end_with_one_line(tmp_path):
    with pytest.raises(UserError, match=r"must hold NAME_TRAIN\.ts"):
        labelled.time_series(str(tmp_path))
    with pytest.raises(UserError, match=r"NoSuchSet.*(neither a folder|pip install aeon)"):
        labelled.time_series("NoSuchSet")
    with pytest.raises(UserError, match=r"needs --config\.task\.path: a folder"):
        labelled.time_series("")


def test_reading_twice_repeats_the_sequence():
    task = recall.make_mqar(16, 2, 16)
    once, twice = task.generate(rng(), 5, 16), examples.read_twice(task).generate(rng(), 5, 16)
    for a, b in zip(once[:2], twice[:2], strict=True):
        np.testing.assert_array_equal(b, np.tile(a, (1, 2)))
    assert not twice.counted[:, :16].any()
    np.testing.assert_array_equal(twice.counted[:, 16:], once.counted)
    assert examples.read_twice(task).longest() == 32
    varying = state_tracking.make("parity", train_length=9, test_lengths=(9,), last_only=False)
    with pytest.raises(ValueError, match="read twice must have one length, got shortest="):
        examples.read_twice(varying)
