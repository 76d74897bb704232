"""A MkDocs hook that adds pages from outside docs/ to the site: notebooks, results, CONTRIBUTING.

An added page keeps its path in the repository. Links between pages follow the folders of the
repository, so they work on GitHub. The hook rewrites them to the folders of the site.
"""

import base64
import json
import pathlib
import posixpath
import re
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "experiments/README.md", "pallas_kernels/README.md")
FOLDERS = ("experiments/results/*.md", "experiments/results/*.png")
LINK = re.compile(r"\]\(([^()\s#:]+)(#[^()\s]*)?\)")
EQUATION = re.compile(r"\$\$(.+?)\$\$", re.S)


def notebook_page(name: str, cells: list[dict[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its figures by file name."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(EQUATION.sub(mathml, source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                figure = f"{name}_{len(figures) + 1}.png"
                figures[figure] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure {len(figures)}]({figure})")
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", figures


def mathml(match: re.Match[str]) -> str:
    """Convert an equation of LaTeX to MathML, which browsers render without scripts."""
    math = latex2mathml.converter.convert(match[1], display="block")
    return f'<div class="equation">{math}</div>'


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the notebooks, and the files of other folders."""
    for path in [*map(ROOT.joinpath, PAGES), *(p for glob in FOLDERS for p in ROOT.glob(glob))]:
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        page, figures = notebook_page(path.stem, json.loads(path.read_text())["cells"])
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, figure in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=figure))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Rewrite links between files of the repository to links between pages of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here if page.file.generated_by else f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return match[0]
        link = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"]({link}{match[2] or ''})"

    return LINK.sub(rewrite, markdown)
