"""The check of an accelerator, at tiny sizes on CPU."""

import json
import os
import subprocess
import sys

import jax
import pytest

import experiments
from experiments.bench import device


def run(tmp_path, only):
    path = tmp_path / "device.json"
    code = device.main(["--tiny", "--only", only, "--output", str(path)])
    content = json.loads(path.read_text())
    return code, content["environment"], content["rows"]


@pytest.mark.slow
def test_a_row_of_every_section(tmp_path, capsys):
    """Check the table and the file, with values of the right kind in every section."""
    only = {
        "correct": "correct linear_scan",
        "ops": "ops a + x",
        "newton": "newton ParaGRU [2, 32, 8] float32, default",
        "train": "train LRU",
    }
    found = {}
    for section, name in only.items():
        code, environment, rows = run(tmp_path, name)
        assert code == 0, rows
        assert environment["jax"] == jax.__version__
        assert [row["section"] for row in rows] == ["ceiling", section]
        found[section] = rows[1]
    assert found["correct"]["error of values"] < 1e-5
    assert found["correct"]["error of gradients"] < 1e-5
    assert found["ops"]["ms"] > 0
    assert found["ops"]["roofline ms"] > 0
    assert found["newton"]["ms"] > 0
    assert found["train"]["tokens/s"] > 0
    printed = capsys.readouterr().out
    assert all(f"| {section} | " in printed for section in only)


def test_a_program_that_fails_is_a_row(tmp_path, monkeypatch):
    def fail(job):
        raise ValueError("no such program")

    monkeypatch.setattr(device, "compile_job", fail)
    code, _, rows = run(tmp_path, "ops a + x")
    assert code == 1
    assert rows[-1]["error"] == "ValueError('no such program')"


def test_programs_that_are_not_compiled_in_time(tmp_path):
    path = tmp_path / "device.json"
    arguments = ["--tiny", "--only", "ops a + x", "--minutes", "0", "--output", str(path)]
    assert device.main(arguments) == 0
    assert json.loads(path.read_text())["rows"][-1]["error"] == "no time left"


def test_every_op_and_cell_has_rows():
    names = [job.name for job in device.op_jobs(device.FULL, lambda: 1.0)]
    for op in ("linear_scan", "selective_scan", "linear_attention", "delta_rule"):
        assert any(name.startswith(op) for name in names)
    cells = {job.name.split(" ")[0] for job in device.newton_jobs(device.TINY)}
    assert cells == set(device.CELLS)


@pytest.mark.slow
def test_it_runs_without_the_extra(tmp_path):
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({experiments.REQUIRED}))\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "device", "--tiny", "--only", "ops a + x"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| ops | a + x" in done.stdout
