"""The allocator's settings: they apply on CPU only, and a command makes them."""

import ctypes
import importlib.util
import json

import jax
import pytest

from experiments.base import allocator
from experiments.bench import allocator as bench


@pytest.fixture
def calls(monkeypatch):
    """Record the settings in place of making them, on a Linux with glibc."""
    made = {}

    class Library:
        def mallopt(self, parameter, value):
            made[parameter] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    return made


@pytest.mark.parametrize(
    ("platforms", "plugin", "applies"),
    [("cpu", True, True), ("cuda,cpu", False, False), (None, False, True), (None, True, False)],
)
def test_the_settings_apply_on_cpu_only(calls, monkeypatch, platforms, plugin, applies):
    monkeypatch.setattr(allocator, "_platforms", lambda: platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: plugin or None)
    assert allocator.keep_memory() is applies
    assert calls == (allocator.SETTINGS if applies else {})


def test_the_choice_of_platforms_is_read_from_jax(calls):
    before = getattr(jax.config, "jax_platforms", None)
    jax.config.update("jax_platforms", "cpu")
    try:
        assert allocator.keep_memory()
    finally:
        jax.config.update("jax_platforms", before)


def test_without_glibc_nothing_is_set(monkeypatch):
    monkeypatch.setattr(allocator, "_on_cpu", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_memory()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_memory()


@pytest.mark.slow
def test_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 1)
    found = json.loads(bench.measure("lru", kept=False))
    assert found["seconds"] > 0
