"""Corpora, TFDS text sets and the Grain pipeline."""

import json
import socket
import sys

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments.base.errors import UserError
from experiments.configs import lm
from experiments.data import corpus, pipeline


def data_config(**overrides):
    data = lm.get_config("quicktest").data
    data.update(overrides)
    return data


def batches(documents, **overrides):
    settings = {"length": 16, "batch_size": 2, "seed": 0, "shuffle_windows": 8} | overrides
    return pipeline.train_batches(documents, **settings)


def test_the_standard_library_is_split_by_file():
    loaded = corpus.load_standard_library(0.1)
    train = sum(map(len, loaded.train))
    heldout = sum(map(len, loaded.heldout))
    assert train > 5_000_000
    assert 0.03 < heldout / (train + heldout) < 0.25
    # No held-out file is trained on, except exact copies.
    assert len(set(loaded.heldout) - set(loaded.train)) > 0.9 * len(loaded.heldout)
    assert any(b"def " in text for text in loaded.heldout)
    assert loaded.fingerprint == corpus.load_standard_library(0.1).fingerprint


def test_the_split_depends_on_names_alone(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_bytes(b"text %d" % index)
    first = corpus.load_path(str(tmp_path), 0.2)
    assert 2 <= len(first.heldout) <= 20
    assert len(first.heldout) + len(first.train) == 40
    assert not set(first.heldout) & set(first.train)
    # Adding a file does not change the split of the other files.
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "another.txt").write_bytes(b"another")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    second = corpus.load_path(str(tmp_path), 0.2)
    assert set(first.heldout) <= set(second.heldout)
    assert set(first.train) <= set(second.train)
    assert b"hidden" not in {*second.train, *second.heldout}
    assert first.fingerprint != second.fingerprint


def test_a_folder_of_two_files_has_one_on_each_side(tmp_path):
    (tmp_path / "a").write_bytes(b"aaa")
    (tmp_path / "b").write_bytes(b"bbb")
    for fraction in (0.001, 0.999):
        loaded = corpus.load_path(str(tmp_path), fraction)
        assert (len(loaded.train), len(loaded.heldout)) == (1, 1)


def test_one_file_is_cut_in_two(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(100)))
    loaded = corpus.load_path(str(file), 0.1)
    assert loaded.train == [bytes(range(90))]
    assert loaded.heldout == [bytes(range(90, 100))]


def test_take_bytes_stops_at_the_limit():
    assert corpus.take_bytes([b"abc", b"def", b"ghi"], 5) == [b"abc", b"de"]
    assert corpus.take_bytes([b"abc"], 5) == [b"abc"]


def test_every_byte_is_predicted_from_the_one_before():
    documents = [bytes([10 * d + i for i in range(1, 8)]) for d in range(1, 5)]
    packed = next(batches(documents, length=28, batch_size=1, shuffle_windows=1))
    assert packed["inputs"].shape == (1, 28)
    inputs, targets, ids = (packed[name][0] for name in ("inputs", "targets", "segment_ids"))
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    assert len(starts) == 4
    assert (inputs[starts] == pipeline.DOCUMENT_START).all()
    inside = np.setdiff1d(np.arange(28), starts)
    np.testing.assert_array_equal(inputs[inside], targets[inside - 1])
    assert sorted(targets) == sorted(b"".join(documents))


def test_batches_are_deterministic():
    documents = [bytes([d]) * (5 + 7 * d) for d in range(1, 20)]
    one, other, different = batches(documents), batches(documents), batches(documents, seed=1)
    for index in range(10):
        a, b, c = next(one), next(other), next(different)
        assert all((a[name] == b[name]).all() for name in a)
        assert index > 0 or (a["targets"] != c["targets"]).any()


def test_batches_resume_exactly_at_every_step():
    # 89 windows an epoch: the steps below cross into a second one and many shuffle buffers, and
    # some windows end exactly where a document does.
    documents = [bytes([d]) * (5 + 7 * d) for d in range(1, 20)]
    ahead = batches(documents)
    for _ in range(60):
        state = json.loads(json.dumps(ahead.get_state()))
        expected = next(ahead)
        resumed = batches(documents)
        pipeline.resume(resumed, state)
        again = next(resumed)
        assert all((again[name] == expected[name]).all() for name in expected)


def test_lanes_hold_every_byte_once():
    documents = [b"abcdefg", b"", b"hij", b"klmnopqrstuvw"]
    streams = pipeline.lanes(documents, count=3, length=4)
    assert streams["inputs"].shape == (3, 8)
    counted = streams["counted"]
    assert bytes(streams["targets"][counted]) == b"".join(documents)
    # Lane starts and document starts read no earlier byte.
    assert (streams["inputs"][streams["reset"] & counted] == pipeline.DOCUMENT_START).all()
    assert streams["reset"].sum() == 3 + 2
    inside = counted & ~streams["reset"]
    lane, time = np.nonzero(inside)
    np.testing.assert_array_equal(streams["inputs"][lane, time], streams["targets"][lane, time - 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b"short", "too small")],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        pipeline.load_corpus(data_config(path=str(file)))


def test_a_folder_without_text(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="no text in"):
        pipeline.load_corpus(data_config(path=str(tmp_path)))


def test_bad_data_fields(tmp_path):
    with pytest.raises(UserError, match="both set"):
        pipeline.load_corpus(data_config(path="a", tfds="b"))
    with pytest.raises(UserError, match="heldout_fraction"):
        pipeline.load_corpus(data_config(heldout_fraction=1.5))


@pytest.fixture
def no_network(monkeypatch):
    """Fail at once on network access, which would hang for minutes."""

    def refuse(*args, **kwargs):
        raise AssertionError("the test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory):
    """Prepare a small text set locally."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples(30), "test": self._generate_examples(6)}

        def _generate_examples(self, count):
            for index in range(count):
                yield index, {"text": f"line {index} of {count}, naïve. " * 4, "label": index}

    folder = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.usefixtures("no_network")
def test_tfds_text_by_name(tiny_text):
    data = data_config(tfds="tiny_text", tfds_dir=str(tiny_text))
    loaded = pipeline.load_corpus(data)
    assert (len(loaded.train), len(loaded.heldout)) == (30, 6)
    assert "naïve" in loaded.train[0].decode()
    assert all(b"of 6" in text for text in loaded.heldout)
    batch = next(batches(loaded.train, length=64))
    assert "line " in bytes(batch["targets"].ravel()).decode(errors="replace")
    assert "tensorflow" not in sys.modules

    part = data_config(
        tfds="tiny_text",
        tfds_dir=str(tiny_text),
        tfds_train="train[:50%]",
        tfds_heldout="train[50%:]",
        tfds_heldout_documents=4,
    )
    loaded = pipeline.load_corpus(part)
    assert (len(loaded.train), len(loaded.heldout)) == (15, 4)


@pytest.mark.usefixtures("no_network")
def test_tfds_mock_data():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=8):
        loaded = pipeline.load_corpus(data_config(tfds="imdb_reviews"))
        assert (len(loaded.train), len(loaded.heldout)) == (8, 8)
        assert next(batches(loaded.train))["targets"].shape == (2, 16)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tfds": "imdb_revews"}, "did you mean 'imdb_reviews'"),
        ({"tfds": "imdb_reviews"}, "not prepared here"),
        ({"tfds": "tiny_text", "tfds_heldout": "validation"}, "Unknown split"),
        ({"tfds": "tiny_text", "tfds_text": "txt"}, "did you mean 'text'"),
    ],
)
def test_bad_tfds_fields(tiny_text, overrides, message):
    with pytest.raises(UserError, match=message):
        pipeline.load_corpus(data_config(tfds_dir=str(tiny_text), **overrides))
