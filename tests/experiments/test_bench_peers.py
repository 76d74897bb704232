"""The benchmark against other libraries, at tiny sizes."""

import pytest

from experiments.bench import peers


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_every_library_runs_the_same_row(name, monkeypatch):
    monkeypatch.setattr(peers, "minima", lambda candidates, _: dict.fromkeys(candidates, 2.0))
    row = peers.rnn_row(name, 2, 5, 4)
    assert row.forward.keys() == row.both.keys()
    assert row.forward[peers.US]().shape == (2, 5, 4)
    for library in ("flax", "torch"):
        if library in row.forward:
            row.forward[library](), row.both[library]()
    assert dict(peers.columns(row, 1))[f"{peers.US} ms"] == 2e3


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda _: None)
    assert list(peers.rnn_row("GRU", 1, 3, 2).forward) == [peers.US]


def test_installed_returns_none_without_the_library():
    assert peers.installed("no_such_library") is None
