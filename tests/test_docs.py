"""Documentation: its code runs, and the reference has every public name."""

import dataclasses
import html
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import seqjax
import seqjax.linen
import seqjax.nnx

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
TEXTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "experiments", "pallas_kernels")
    for path in (ROOT / folder).glob("*.md")
)
WITH_CODE = [page for page in PAGES if "```python" in (ROOT / page).read_text()]
ARCHITECTURES = [
    made
    for module in (seqjax.layers, seqjax.cells, seqjax.models)
    for made in map(module.__dict__.get, module.__all__)
    if inspect.isclass(made)
    and issubclass(made, (seqjax.layers.Layer, seqjax.cells.Cell))
    and made is not seqjax.layers.Layer  # docs/guides/adding.md has one
]


def defined(module):
    """Return the public functions and classes of a module."""
    return {
        name
        for name, made in vars(module).items()
        if inspect.isfunction(made) or inspect.isclass(made)
        if not name.startswith("_") and made.__module__ == module.__name__
    }


def public_names():
    """Return the public objects by their import path."""
    ops = [name for name in vars(seqjax) if name in vars(seqjax.ops) and not name.startswith("_")]
    names = {f"seqjax.{name}" for name in ops if not inspect.ismodule(getattr(seqjax, name))}
    names |= {f"seqjax.ops.{name}" for name in seqjax.ops.__all__ if not hasattr(seqjax, name)}
    for module in (seqjax.layers, seqjax.models, seqjax.cells):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    names |= {f"seqjax.sharding.{name}" for name in defined(seqjax.sharding)}
    for name in seqjax.generation.__all__:  # those that the package has too go by the short path
        short = hasattr(seqjax, name)
        names.add(f"seqjax.{name}" if short else f"seqjax.generation.{name}")
    names |= {
        f"seqjax.pretrained.{name}" for name in seqjax.pretrained.__all__ if name != "FAMILIES"
    }
    names |= {f"seqjax.methods.{name}" for name in seqjax.methods.__all__}
    return names | {"seqjax.nnx.Recurrent", "seqjax.linen.Recurrent"}


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)(?:\n    options: {heading: (\S+)})?", text, re.M)
    assert sorted(heading or path for path, heading in entries) == sorted(public_names())
    for path, heading in entries:
        # A heading other than the path is for a function whose module has the same name.
        if heading:
            assert path.split(".")[-1] == heading.split(".")[-1]


def test_every_page_can_be_found():
    """Check that the site lists all pages of docs/, all notebooks and existing pages only."""
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[-1]
    listed = set(re.findall(r"^ +- (?:\w+: )?([\w/]+\.md)$", nav, re.M))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    notebooks = {f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")}
    assert pages | notebooks <= listed
    assert all((ROOT / page).exists() for page in listed - pages - notebooks)


@pytest.mark.parametrize("page", sorted({*TEXTS, *PAGES}))
def test_links_lead_somewhere(page):
    """Check the links to files of the repository, including figures."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    files = [link.split("#")[0] for link in links if "://" not in link and link[0] != "#"]
    missing = [link for link in files if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", TEXTS)
def test_lists_render_as_lists(page):
    """Check for an empty line before each list, which Markdown needs and GitHub does not."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    assert not re.findall(r"^(?![-*#|>]|\s|\d+\. ).+\n[-*] .*", text, re.M)


@pytest.mark.parametrize("page", sorted({*TEXTS, *PAGES}))
def test_tables_end(page):
    """Check for an empty line after each table; without it the next line becomes a row."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    assert not re.findall(r"^\|.*\n(?!\||\n|<!--|\Z).*", text, re.M)


def test_images_lead_somewhere_outside_github():
    """Check that images are files under docs/, which mkdocs copies to the site."""
    for page in PAGES:
        if page == "README.md":
            continue
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            image = (ROOT / page).parent.joinpath(link).resolve()
            assert image.is_relative_to(ROOT / "docs"), f"{page}: {link}"
            assert image.exists(), f"{page}: {link}"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("material", "latex2mathml")),
    reason="needs the extra `docs`",
)
def test_the_site_renders(tmp_path):
    """Build the site; check lists, examples, equations and images, and that it works offline."""
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    home = pages[tmp_path / "index.html"]
    assert re.search(r"The contract of every op:</p>\s*<ul>\s*<li>", home)
    assert 'href="wide.css"' in home
    for path, text in pages.items():
        prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
        assert "&gt;&gt;&gt;" not in prose, path
        assert "<blockquote>" not in prose, path  # what Markdown makes of ">>>"
        assert not re.search(r'<(?:script|img|iframe)[^>]* src="http', text), path
        assert not re.search(r'<link[^>]* href="http', text), path
        for source in re.findall(r'<img[^>]* src="([^"]+)"', text):
            assert source.startswith("data:") or (path.parent / source).exists(), path
    reference = [text for path, text in pages.items() if "reference" in path.parts]
    code = [pre for text in reference for pre in re.findall(r"<pre.*?</pre>", text, re.S)]
    shown = html.unescape(re.sub(r"<[^>]+>", "", "".join(code)))
    for name in ("Leaky", "Param((8,)", "Newton(window=32", "info.sequential_steps"):
        assert name in shown, name
    for path in ROOT.glob("notebooks/*.ipynb"):
        page = pages[tmp_path / "notebooks" / f"{path.stem}.html"]
        assert "<img" in page
        assert "$$" not in page  # an equation that is not MathML


def test_there_is_code():
    assert {"README.md", "docs/guides/newton.md"} < set(WITH_CODE)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page == "README.md" else [pytest.mark.slow])
        for page in WITH_CODE
    ],
)
def test_code_runs(page):
    """Run the code of a page from top to bottom."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S):
        exec(compile(block, page, "exec", dont_inherit=True), names)


@pytest.mark.parametrize(
    "made", ARCHITECTURES, ids=lambda made: f"{made.__module__}.{made.__name__}"
)
def test_architectures_are_documented(made):
    """Check that the docstring has fields, an example, the state and a reference."""
    text = made.__doc__
    if inspect.isabstract(made):
        assert ">>>" in text, "no example of one's own"
        return
    for field in dataclasses.fields(made):
        listed = rf"^ +(\w+, )*{field.name}(, \w+)*:"
        assert re.search(listed, text, re.M), field.name
    assert ">>>" in text
    if made.__module__.startswith("seqjax.models"):
        return
    assert re.search(r"\b[Ss]tate\b", text), "no state"
    assert re.search(r"\d{4}\.\d{4,5}|\b(19|20)\d\d\b", text), "no source"
