"""The benchmark of generation, at tiny sizes."""

import pytest

from experiments.bench import generate


@pytest.mark.slow
def test_a_row_has_rates_and_ratios(monkeypatch):
    monkeypatch.setattr(generate, "DIM", 16)
    monkeypatch.setattr(generate, "PROMPT", 8)
    monkeypatch.setattr(generate, "TOKENS", 4)
    row = generate.rates("lru", 2, rounds=1)
    assert list(row) == generate.COLUMNS
    assert all(float(str(value).replace(",", "")) > 0 for value in row.values())
