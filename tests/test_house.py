"""Structure of the repository: directions of imports, lengths of files, doctests."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

import beartype
import jax.numpy as jnp
import jaxtyping
import pytest

import seqjax
from tests.contract.cases import OPS
from tests.contract.harness import cast, make

ROOT = pathlib.Path(__file__).parent.parent
# Each may import those before it; `seqjax.types` belongs to the ops.
FLOORS = [
    ("pallas_kernels",),
    ("seqjax.types", "seqjax.ops"),
    ("seqjax.cells", "seqjax.methods"),
    ("seqjax.layers",),
    ("seqjax.models",),
    ("seqjax.generation",),
    ("seqjax.nnx", "seqjax.linen", "seqjax.sharding", "seqjax.pretrained"),
    ("experiments", "notebooks"),
]
SOURCES = [
    path
    for folder in ("pallas_kernels", "seqjax", "experiments", "notebooks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = sorted(m.name for m in pkgutil.walk_packages(seqjax.__path__, "seqjax."))


def floor(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def imported(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which way they go"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def upward(module: str, source: str) -> list[str]:
    here = floor(module)
    if here is None:
        return []
    wrong = [name for name in imported(source) if (floor(name) or 0) > here]
    if here == 0:
        # A leaf imports jax, NumPy, the standard library and its own modules.
        known = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
        wrong += [name for name in imported(source) if name.split(".")[0] not in known]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert upward(module, path.read_text()) == []


def test_an_upward_import_is_seen():
    assert upward("seqjax.ops.x", "from seqjax.layers import LRU") == ["seqjax.layers.LRU"]
    assert upward("seqjax.layers.x", "import seqjax.models.backbone") == ["seqjax.models.backbone"]
    assert upward("pallas_kernels.x", "from seqjax.ops import linear_scan")
    assert not upward("seqjax.models.x", "from seqjax.layers import LRU")


# Folders of experiments, each with those that it may import; the commands may import all.
ROOMS = {
    "control": {"training", "base"},
    "sweeps": {"configs", "tasks", "base"},
    "training": {"objectives", "base"},
    "objectives": {"tasks", "data", "base"},
    "configs": {"tasks", "base"},
    "tasks": {"data", "base"},
    "data": {"base"},
    "bench": {"compiled", "base"},
    "compiled": set(),
    "base": set(),
}


def room_imports(path, source):
    """Return the folders that a file of experiments imports from, other than its own."""
    folder = path.parts[0] if len(path.parts) > 1 else "commands"
    names = [name.split(".")[1] for name in imported(source) if name.startswith("experiments.")]
    return folder, {name if name in ROOMS else "commands" for name in names} - {folder}


def test_experiments_import_downward():
    """Check the order: commands, then training and objectives, down to base."""
    arrows = set()
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        folder, used = room_imports(path.relative_to(ROOT / "experiments"), path.read_text())
        if folder != "commands":
            assert used <= ROOMS[folder], path
        arrows |= {(folder, other) for other in used}
    order = list(ROOMS)
    for folder, below in ROOMS.items():
        assert all(order.index(folder) < order.index(other) for other in below)
    assert set(order) | {"results"} == {
        entry.name
        for entry in (ROOT / "experiments").iterdir()
        if entry.is_dir() and entry.name != "__pycache__"
    }
    assert len(arrows) <= 30
    assert room_imports(pathlib.Path("base/x.py"), "from experiments.configs import lm") == (
        "base",
        {"configs"},
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


# Examples of layers and models look alike: the quick tests run few of them.
EXAMPLES = ("seqjax.layers._base", "seqjax.layers.lru", "seqjax.models.backbone")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow]
            if name.startswith(("seqjax.generation", "seqjax.layers", "seqjax.models"))
            and name not in EXAMPLES
            else [],
        )
        for name in MODULES
    ],
)
def test_docstring_examples(name, compiled_quickly):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [n for n in dir(seqjax) if inspect.isclass(getattr(seqjax, n))])
def test_public_classes_are_documented(name):
    made = getattr(seqjax, name)
    for field in made.__annotations__:
        assert re.search(rf"^\s+{field}:", made.__doc__, re.M), field


FUNCTIONS = [
    n
    for n in dir(seqjax)
    if callable(getattr(seqjax, n)) and not inspect.isclass(getattr(seqjax, n))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
    function = getattr(seqjax, name)
    for part in ("Args:", "Returns:", "Raises:", "Example:", ">>>"):
        assert part in function.__doc__, f"{name} has no {part}"
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^\s+(\w+, )*{argument}(, \w+)*:", function.__doc__, re.M), argument


# Options that the arrays of a row require.
OPTIONS = {
    "linear_attention-exclusive": {"exclusive": True},
    "linear_attention-normalizer": {"normalizer": True},
}


@pytest.mark.parametrize("case", OPS, ids=str)
def test_annotations_are_true(case, compiled_quickly):
    inputs, state, reset = make(case)
    function = getattr(seqjax, str(case).split("-")[0])
    if function in (seqjax.monoid_scan, seqjax.nonlinear_scan, seqjax.step_scan):
        pytest.skip("its arrays are trees of any shape")
    if str(case) == "selective_scan-online":
        pytest.skip("the arrays of the other rows, without A")
    typed = jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)
    arrays = cast(inputs, "float32")
    options = OPTIONS.get(str(case), {})
    if "A_log" in arrays:
        gate = seqjax.ops.SoftplusGate(arrays.pop("A_log"), arrays.pop("dt_bias"))
        options = {"gate": gate, "normalize": True}
    typed(**arrays, initial_state=cast(state, "float32"), reset=jnp.asarray(reset), **options)
