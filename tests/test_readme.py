"""README.md: its length, and every name, path, number and command in it."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
import tomllib
import types

import jax
import pytest

import seqjax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GENERATED = re.compile(r"<!-- --8<-- \[start:(?:ops|architectures)\] -->.*?\[end:\w+\] -->", re.S)
CODE = re.compile(r"^```.*?^```", re.M | re.S)
NAMESPACES = (seqjax, seqjax.layers, seqjax.models, jax)
PROSE = CODE.sub("", README)
ENTRIES = {**seqjax.layers.REGISTRY, **seqjax.layers.GRID_REGISTRY}


def load(name):
    """Import a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(name):
    """Return the object that a dotted name means in seqjax or jax; raise if there is none."""
    first, *rest = name.split(".")
    if first == "seqjax":
        for part in rest[:1]:
            if importlib.util.find_spec(f"seqjax.{part}"):
                importlib.import_module(f"seqjax.{part}")
    found = [getattr(space, first) for space in NAMESPACES if hasattr(space, first)]
    made = {"seqjax": seqjax, "jax": jax}.get(first) or next(iter(found), None)
    if made is None:
        raise AttributeError(f"{name} is not in seqjax or jax")
    for part in rest:
        made = getattr(made, part)
    return made


def arguments(made):
    """Return the names of the arguments of a function or class."""
    return set(inspect.signature(made).parameters)


def meanings(text):
    """Return the object, argument, path or configuration that a name in backticks means."""
    if text.startswith((".venv", "runs/")):
        return text  # the commands make these folders
    if re.fullmatch(r"[\w.]+", text) and not text.endswith(".md"):
        if text in ENTRIES:
            return ENTRIES[text]
        if text in arguments(seqjax.linear_scan) | arguments(seqjax.layers.LRU.apply):
            return text
        return resolve(text)
    if "/" in text or text.endswith(".md"):
        assert (ROOT / text).exists(), text
        return text
    [call] = ast.parse(f"f({text})").body  # an argument such as `gated=True`
    assert isinstance(call.value, ast.Call)
    for keyword in call.value.keywords:
        takers = [
            made
            for made in (*vars(seqjax).values(), *vars(seqjax.layers).values())
            if (inspect.isclass(made) or inspect.isfunction(made))
            and keyword.arg in arguments(made)
        ]
        assert takers, text
    return text


def rows(start):
    """Return the cells of the table with a header that starts with `start`."""
    lines = README[README.index(start) :].split("\n\n")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_length():
    """Count the words of prose, headings, links and hand-written tables: at most 700.

    Blocks of code and the tables that docs/tables.py writes do not count. A link counts by its
    text, and a punctuation mark between spaces does not count.
    """
    text = CODE.sub("", GENERATED.sub("", README))
    text = re.sub(r"<!--.*?-->|</?\w+>|\]\([^)]*\)", " ", text)
    assert len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= 700


@pytest.mark.parametrize("text", sorted(set(re.findall(r"`([^`\n]+)`", PROSE))))
def test_names_exist(text):
    assert meanings(text) is not None


def test_an_unknown_name_is_seen():
    for wrong in ("linear_scam", "seqjax.flax", "lax.scam", "docs/none.md"):
        with pytest.raises((AttributeError, AssertionError)):
            meanings(wrong)
    with pytest.raises(AssertionError):
        meanings("implement='pallas'")


def test_the_tables_are_those_of_the_code():
    """Compare with the output of docs/tables.py, and resolve every row."""
    assert load("tables").updated(README) == README
    for title, name, layer, op, _, paper in rows("| architecture |"):
        entry = ENTRIES[name.strip("`")]
        assert entry.title == title
        made, *fixed = re.findall(r"`([^`]+)`", layer)
        assert issubclass(getattr(seqjax.layers, made), seqjax.layers.Layer)
        fields = {field.name for field in dataclasses.fields(getattr(seqjax.layers, made))}
        assert all(item.split("=")[0] in fields for text in fixed for item in text.split(", "))
        assert op == "" or callable(getattr(seqjax, op.strip("`")))
        assert re.fullmatch(r"\[(\S+)\]\(https://arxiv.org/abs/\1\)|.* \d{4}", paper)
    titles = [title for row in rows("| op |") for title in row[1].split(", ")]
    assert sorted(titles) == sorted(entry.title for entry in ENTRIES.values())


def test_every_layer_is_named():
    named = set(re.findall(r"`(\w+)`", README))
    assert (
        set(seqjax.layers.__all__) - {"Context", "Entry", "Param", "REGISTRY", "GRID_REGISTRY"}
        <= named
    )


def test_speeds_are_in_the_tables_they_link_to():
    """Find every time, ratio or inverse ratio of the table "Speed" in the linked file."""
    table = rows("| case |")
    assert len(table) == 5
    for case, ours, theirs, where in table:
        assert callable(resolve(re.match(r"`(\w+)`", case)[1]))
        text = (ROOT / re.search(r"\]\(([^)#]+)", where)[1]).read_text()
        for number, unit in re.findall(r"([\d.]+) (ms|times \w+)", f"{ours} {theirs}"):
            values = {number} if unit != "times slower" else set()
            for written in re.findall(r"\b0\.\d\d\b", text):
                if unit == "times slower" and f"{1 / max(float(written), 0.01):.2f}" == number:
                    values.add(written)
            assert any(value in text for value in values), number


def tree(block):
    """Return the paths in a map of folders, each with the description of its line."""
    parents, found = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names, *about = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        parents = [*parents[:depth], names.split()[0]]
        found += [("".join([*parents[:depth], name]), *about) for name in names.split()]
    return found


def test_the_map_shows_the_house():
    """Check the map of the code: its length, its paths, and that no folder is missing."""
    [block] = [code for code in CODE.findall(README) if "pallas_kernels/  " in code]
    block = block.strip("`\n")
    assert len(block.splitlines()) <= 25
    shown = set()
    for path, *about in tree(block):
        found = list(ROOT.glob(path.replace("<op>", "*").rstrip("/")))
        assert found, path
        shown |= {item.relative_to(ROOT) for item in found}
        inside = re.findall(r"\b(\w+)/", " ".join(about))
        assert all((ROOT / path / name).is_dir() for name in inside), path
        shown |= {pathlib.Path(path) / name for name in inside}
        for commands in re.findall(r"commands: (.*)", " ".join(about)):
            for command in commands.split():
                assert importlib.util.find_spec(f"experiments.{command}"), command
    folders = {
        item.relative_to(ROOT)
        for folder in ("seqjax", "seqjax/ops", "experiments", "tests")
        for item in (ROOT / folder).iterdir()
        if item.is_dir() and item.name != "__pycache__"
    }
    assert folders <= shown


def test_commands_exist():
    """Check the modules, files and extras in the shell commands."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    for module in re.findall(r"-m (experiments\.\w+)", shell):
        assert importlib.util.find_spec(module)
    for path, name in re.findall(r"--config=(\S+):(\w+)", shell):
        assert (ROOT / path).exists()
        assert name in seqjax.layers.REGISTRY
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r'"\.\[([\w,-]+)\]"', shell):
        assert set(extra.split(",")) <= set(extras["optional-dependencies"])


@pytest.mark.parametrize("repository", ["", "https://example.org/owner/seqjax"])
def test_the_description_of_the_package_has_no_dead_links(repository, monkeypatch):
    """Check the text for package indexes, which do not have the files of the repository."""
    interface = types.ModuleType("interface")
    interface.MetadataHookInterface = object  # hatchling is there only during builds
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    text = load("description").description(README, repository)
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text))
    assert all(link.startswith("https://") for link in links)
    assert ("mqar.png" in text) == bool(repository)
    assert CODE.findall(text) == CODE.findall(README)
    assert f"{repository}/blob/main/LICENSE" in text or not repository
