"""The benchmark of generation, at tiny sizes."""

import types

import pytest

from experiments.bench import generate, speculate
from seqjax.layers import REGISTRY
from tests.contract.harness import assert_close
from tests.generation.models import leaves


def test_every_op_and_every_other_module_has_a_row(monkeypatch):
    monkeypatch.setattr(generate, "LAYERS", types.SimpleNamespace(value=[]))
    names = generate.layer_names()
    assert len(names) == len({generate.family(name) for name in REGISTRY})
    assert {REGISTRY[name].op for name in names} == {entry.op for entry in REGISTRY.values()}
    modules = {entry.layer.__module__ for entry in REGISTRY.values() if not entry.op}
    assert {REGISTRY[name].layer.__module__ for name in names if not REGISTRY[name].op} == modules


@pytest.mark.slow
def test_a_row_has_rates_and_ratios(monkeypatch):
    monkeypatch.setattr(generate, "DIM", 16)
    monkeypatch.setattr(generate, "PROMPT", 8)
    monkeypatch.setattr(generate, "TOKENS", 4)
    generate.make_model.cache_clear()
    row = generate.rates("lru", 2, rounds=1)
    assert list(row) == generate.COLUMNS
    assert all(float(str(value).replace(",", "")) > 0 for value in row.values())


@pytest.mark.slow
def test_both_ways_to_restore_a_state_agree():
    ways = speculate.rollbacks("lru", 3)
    expected, found = (run() for run in ways.values())
    assert_close(leaves(found), leaves(expected), 1e-5)
