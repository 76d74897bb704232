"""Distribution, public names of the package, and commands without their extras."""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest

import experiments
import seqjax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(
    path.stem if path.stem != "__main__" else path.parent.name
    for pattern in ("*.py", "*/__main__.py")
    for path in (ROOT / "experiments").glob(pattern)
    if "__main__" in path.read_text()
)


@pytest.mark.parametrize(
    "name", ["seqjax", "seqjax.ops", "seqjax.cells", "seqjax.layers", "seqjax.models"]
)
def test_all_is_complete(name):
    """Check that `__all__` lists exactly the public imports of the package."""
    package = importlib.import_module(name)
    imported = {
        alias.asname
        for node in ast.parse(pathlib.Path(package.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*package.__all__} - {"__version__"} == imported
    assert len(package.__all__) == len({*package.__all__})
    namespace = {}
    exec(f"from {name} import *", namespace)
    assert {*package.__all__} <= {*namespace}


def test_the_docstring_lists_what_there_is():
    listed = set(re.findall(r"`(\w+)`", seqjax.__doc__))
    assert {*seqjax.__all__} - {"__version__"} <= listed


def test_the_version_has_one_source():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", seqjax.__version__)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {seqjax.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert f"## {seqjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_license():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) == 202


@pytest.mark.slow
def test_contents_of_the_wheel(tmp_path):
    """Build the distributions in isolation, as users do."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"seqjax-{seqjax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"seqjax-{seqjax.__version__}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = archive.read(f"{info}/METADATA").decode()
    for line in ("License-Expression: Apache-2.0", "Author: The seqjax authors"):
        assert f"\n{line}\n" in metadata
    assert {"seqjax/py.typed", "pallas_kernels/py.typed"} <= {*names}
    assert {name.split("/")[0] for name in names} == {"seqjax", "pallas_kernels", info}


def test_hints_name_no_package_of_an_index():
    """Check that hints install from a clone: seqjax is on no index yet."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("seqjax", "pallas_kernels", "experiments", "notebooks", "docs", "tests"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".ipynb")]
    wrong = re.compile(r"pip install (?:-\S+ )*\\?['\"]?seqjax\b|\bseqjax\[\w")
    for file in files:
        assert not wrong.search(file.read_text()), file


def test_every_package_that_commands_import_is_checked():
    """Compare the imports of `experiments`, without those of seqjax, with its list."""
    imported = set()
    for path in (ROOT / "experiments").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    own = {"experiments", "seqjax", "pallas_kernels", "jax", "numpy", "jaxtyping"}
    assert imported - own - set(sys.stdlib_module_names) == {*experiments.REQUIRED}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extras(tmp_path, command):
    """Check for one line with the install command, and exit code 2."""
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({experiments.REQUIRED}))\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: experiments: {', '.join(experiments.REQUIRED)} must be installed;"
        " pip install -e '.[experiments]' from a clone\n"
    )


@pytest.mark.parametrize(
    ("suite", "package", "extra"),
    [("tpu", "libtpu", "aot"), ("gpu", "jax-cuda13-plugin", "aot-gpu")],
)
def test_a_suite_without_its_compiler(monkeypatch, suite, package, extra):
    bench = pytest.importorskip("experiments.bench.__main__")
    errors = pytest.importorskip("experiments.base.errors")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(bench, "ROUNDS", types.SimpleNamespace(value=1))
    with pytest.raises(errors.UserError) as raised:
        bench.main(None, [suite])
    assert str(raised.value) == (
        f"{package} is not installed: pip install -e '.[{extra}]' from a clone"
    )


@pytest.mark.slow
def test_only_the_adapters_need_flax():
    """Check that without Flax the library imports, and the adapters raise a one-line hint."""
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import seqjax\n"
        "for name in ('nnx', 'linen'):\n"
        "    try:\n"
        "        __import__('seqjax.' + name)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
        "print(any(name.startswith('flax.') for name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "seqjax.nnx needs Flax, which is not installed: pip install -e '.[flax]' from a clone.",
        "seqjax.linen needs Flax, which is not installed: pip install -e '.[flax]' from a clone.",
        "False",
    ]
