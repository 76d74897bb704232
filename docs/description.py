"""A Hatch hook that makes README.md the description of the package.

README.md links to files of the repository, which a package index does not have. The build completes
these links with the address `repository` from pyproject.toml, [tool.hatch.metadata.hooks.custom].
While the address is empty, links and figures become plain text.
"""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FIGURE = re.compile(r"^!\[([^]]*)\]\((?!\w+:)([^)\s]+)\)\n\n?", re.M)
LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!\w+:)([^)\s]+)\)")


def description(readme: str, repository: str) -> str:
    """Return the text of README.md without links to files that an index does not have."""
    if not repository:
        return LINK.sub(r"\1", FIGURE.sub(r"Figure in the repository: \1.\n\n", readme))
    readme = FIGURE.sub(rf"![\1]({repository}/raw/main/\2)\n\n", readme)
    return LINK.sub(rf"[\1]({repository}/blob/main/\2)", readme)


class Description(MetadataHookInterface):
    """Sets `readme` when the package is built or installed."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description to the metadata."""
        readme = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = description(readme, self.config.get("repository", "").rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
