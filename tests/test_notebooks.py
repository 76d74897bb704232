"""Notebooks: both forms agree, and each notebook runs from top to bottom at a small size."""

import os
import pathlib
import re
import subprocess
import sys

import jupytext
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_both_forms_agree(source):
    """Compare both forms. Update the second one: jupytext --to ipynb --update notebooks/*.py."""
    assert cells(source) == cells(source.with_suffix(".ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_those_of_a_fresh_kernel(source):
    """Check the committed outputs. Run a changed notebook again: see CONTRIBUTING.md."""
    notebook = source.with_suffix(".ipynb")
    assert notebook.stat().st_size <= 1_000_000
    code = [cell for cell in jupytext.read(notebook).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {output.get("name", output.output_type) for output in outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}  # no warnings, no errors
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert set(output.get("data", {})) <= {"image/png", "text/plain"}
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"/(home|root|tmp|usr|opt|work|Users)/|:\\\\|[Ww]arning", text)


def test_every_notebook_has_a_source():
    assert [
        path.with_suffix(".py") for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ] == SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_installs_in_colab_and_nowhere_else(source, monkeypatch, tmp_path):
    """Check the first code cell, which is equal in all notebooks."""
    install = next(source for kind, source in cells(source) if kind == "code")
    assert install == next(text for kind, text in cells(SOURCES[0]) if kind == "code")
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    exec(install, {})
    assert commands == []
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    with pytest.raises(ValueError, match="REPOSITORY must be the address"):
        exec(install, {})
    exec(install.replace('REPOSITORY = ""', 'REPOSITORY = "address"'), {})
    clone, pip = commands
    assert clone[:2] == ["git", "clone"]
    assert "address" in clone
    assert pip[:4] == [sys.executable, "-m", "pip", "install"]
    assert sys.path[0] == clone[-1]
    # After a restart of the kernel, the checkout exists, but the path entry does not.
    (tmp_path / clone[-1]).mkdir()
    sys.path.remove(clone[-1])
    exec(install, {})
    exec(install, {})
    assert len(commands) == 2
    assert sys.path.count(clone[-1]) == 1


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem[0] != "1"))
        for path in SOURCES
    ],
)
def test_runs(source, tmp_path):
    """Run a notebook in a separate process."""
    environment = dict(
        os.environ,
        SEQJAX_NOTEBOOK="tiny",
        MPLBACKEND="Agg",
        PYTHONPATH=str(ROOT),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    done = subprocess.run(
        [sys.executable, str(source)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rematerialization" not in done.stderr  # XLA copies an array to all devices
