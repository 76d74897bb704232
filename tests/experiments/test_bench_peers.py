"""The benchmark against other libraries, at tiny sizes."""

import jax
import numpy as np
import pytest

import seqjax
from experiments.bench import loops, peers


@pytest.mark.slow
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


@pytest.mark.slow
def test_rows_of_ops_run_in_every_library():
    for row in (peers.mamba_row(1, 5, 4), peers.delta_rule_row(1, 5)):
        assert row.forward.keys() == row.both.keys()
        for run in (*row.forward.values(), *row.both.values()):
            run()


def test_scans_and_loops_run():
    for group in loops.candidates(2, 5, 3):
        for run in (*group.values(), *group.values()):  # a donated result is the next input
            run()


def test_numba_loops_compute_the_scan_and_its_adjoint():
    decay, x, dy = np.random.default_rng(0).normal(size=(3, 2, 6, 3)).astype(np.float32)
    y = loops.scan_loop(decay, x, np.empty_like(x))
    found, pull = jax.vjp(lambda decay, x: seqjax.linear_scan(decay, x)[0], decay, x)
    np.testing.assert_allclose(y, found, rtol=1e-5, atol=1e-5)
    for slope, wanted in zip(loops.adjoint_loop(decay, y, dy), pull(dy), strict=True):
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-4)


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda _: None)
    assert list(peers.rnn_row("GRU", 1, 3, 2).forward) == [peers.US]


def test_installed_returns_none_without_the_library():
    assert peers.installed("no_such_library") is None
