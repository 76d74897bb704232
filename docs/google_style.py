"""A Griffe extension that reads this library's docstrings for the reference.

The docstrings use "Example:" for one example and list arguments of one kind together, as in
"q, k: ...". Griffe expects "Examples:" and one argument per entry.
"""

import re
from typing import Any

import griffe

TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)


def separately(match: re.Match[str]) -> str:
    """Repeat the entry for each of its arguments."""
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class GoogleStyle(griffe.Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of every module, class and function."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = TOGETHER.sub(separately, text)
