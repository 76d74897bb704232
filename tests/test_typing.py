"""Types: mypy and pyright check a program that calls the whole library."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
EXAMPLE = ROOT / "tests" / "typing_example.py"
CHECKERS = {
    "mypy": ["--strict", "--cache-dir=.mypy_cache"],
    "pyright": ["--pythonpath", sys.executable],
}
# Lines that a type checker must refuse, and what its message contains.
WRONG = {
    "seqjax.layers.LRU(dim='8')": '"dim"',
    "seqjax.linear_scan(1, 2, chunks=3)": '"chunks"',
    "layer.apply(jnp.ones(3), {})": '"dict[',
    "layer.widen(3)": '"widen"',
    "seqjax.matrix_scan": '"matrix_scan"',
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_program_is_clean_and_mistakes_are_found(checker, tmp_path):
    """Check types against an installed seqjax, whose types are read because of `py.typed`.

    Without the second part, a checker that sees no types would pass.
    """
    pytest.importorskip(checker)
    shutil.copy(EXAMPLE, tmp_path / "program.py")
    lines = ["import jax.numpy as jnp, seqjax", "layer = seqjax.layers.LRU(dim=8)", *WRONG]
    (tmp_path / "mistakes.py").write_text("\n".join(lines) + "\n")
    # optax ships no types.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-optax.*]\nignore_missing_imports = true\n")
    done = subprocess.run(
        [sys.executable, "-m", checker, *CHECKERS[checker], "program.py", "mistakes.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"(\w+)\.py:(\d+):.*? error: (.*)", done.stdout)
    assert {(file, int(line)) for file, line, _ in found} == {
        ("mistakes", line) for line in range(3, 3 + len(WRONG))
    }, done.stdout
    for number, expected in enumerate(WRONG.values(), 3):
        messages = [message for _, line, message in found if int(line) == number]
        assert expected in "".join(messages)


@pytest.mark.usefixtures("compiled_quickly")
def test_the_program_runs():
    program = pytest.importorskip("tests.typing_example")
    assert program.main() == {
        "losses": (2,),
        "logits": (2, 9, 16),
        "sample": (2, 3),
        "finals": (9,),
        "scores": (2, 3),
        "tags": (2, 5, 3),
        "stacked": (2, 5, 3),
        "wider": (32,),
    }
