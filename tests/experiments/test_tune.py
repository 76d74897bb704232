"""The command for block sizes, with given times in place of compiled programs."""

import json

import jax
import pytest
from absl.testing import flagsaver

from experiments.base import cli
from experiments.bench import __main__ as bench
from experiments.bench import tpu, tune

ROW = "linear_scan, B=8, T=4096, D=1000"


def run(*arguments):
    with flagsaver.flagsaver():
        words = ["bench", *arguments, "tune"]
        return cli.run(bench.define_flags, bench.main, words, takes_words=True)


@pytest.fixture(autouse=True)
def given_times(monkeypatch):
    def measure(name, dtype, chip, implementation, block_sizes):
        assert (name, implementation) == (ROW, "pallas")
        if block_sizes == (512, 1000):
            raise RuntimeError("no room in VMEM")
        fast = chip == "v6e" and block_sizes == (256, 512)
        return {"seconds": 1e-3 if fast else 2e-3}

    monkeypatch.setattr(tpu, "measure", measure)
    monkeypatch.setattr(tune, "installed_version", lambda *_: "0")


def test_the_fastest_block_sizes_of_each_chip_are_written(tmp_path, capsys):
    path = tmp_path / "blocks.json"
    assert run(f"--only={ROW}, bfloat16", "--chips=v5e,v6e", f"--output={path}") == 0
    text = capsys.readouterr().out
    assert "| default | 2.000 | 1.00 | 2.000 | 1.00 |" in text
    assert "| (256, 512) | 2.000 | 1.00 | 1.000 | 0.50 |" in text
    assert "| (512, 1000) | not compiled |  | not compiled |  |" in text
    assert "v6e, (512, 1000): no room in VMEM" in text
    key = f"{ROW}, bfloat16"
    wanted = {"v5e": {"linear_scan": {key: None}}, "v6e": {"linear_scan": {key: [256, 512]}}}
    assert json.loads(path.read_text()) == wanted


def test_unknown_rows_and_chips_are_named(capsys):
    for argument, message in (
        ("--only=conv", "--only: no row of experiments.bench tpu starts with 'conv'"),
        ("--chips=v9", "--chips: unknown chip 'v9': "),
    ):
        assert run(argument) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", tune.BLOCKS)
def test_ops_accept_the_candidates(op):
    row = next(row for row in tpu.ROWS.values() if row.op == op)
    for block_sizes in (tune.candidates(row, "bfloat16")[n] for n in (0, -1)):
        function, shapes = tpu.program(row, row.length, "bfloat16", "pallas", block_sizes)
        jax.eval_shape(function, *shapes)
    function, shapes = tpu.program(row, row.length, "bfloat16", "pallas", (7, 7))
    with pytest.raises(ValueError, match=f"^{op}: `block_sizes` must be"):
        jax.eval_shape(function, *shapes)
