"""Write the tables of README.md that the code determines: python docs/tables.py."""

import pathlib
import re

from seqjax.layers import GRID_REGISTRY, REGISTRY, Entry, GateLoop, Longhorn
from seqjax.ops.core.backends import BACKENDS

README = pathlib.Path(__file__).parent.parent / "README.md"
PLATFORMS = {"tpu": "TPU", "cuda": "GPU"}
ENTRIES = {**REGISTRY, **GRID_REGISTRY}


def kernels(entry: Entry) -> str:
    """Return the platforms with a Pallas kernel that supports the layer; see `BACKENDS`.

    If the kernel is the default on a platform, the others are left out.
    """
    found = BACKENDS.get(entry.op)
    layer = entry.make(64, **entry.defaults(64, 4))
    # The kernels of `linear_attention` are real, those of `selective_scan` have exponential decays.
    if found is None or isinstance(layer, GateLoop | Longhorn):
        return ""
    default = {"cuda" if target == "hopper" else target for target in found.preferred}
    named = "" if default else " (by name)"
    platforms = [platform for platform in PLATFORMS if platform in (default or found.modules)]
    return ", ".join(PLATFORMS[platform] for platform in platforms) + named


def ops() -> str:
    """Return the table of ops, with the architectures that each op computes."""
    titles: dict[str, list[str]] = {}
    for entry in ENTRIES.values():
        titles.setdefault(entry.op, []).append(entry.title)
    rows = ["| op | architectures |", "|---|---|"]
    titles["none"] = titles.pop("", [])
    for op, names in titles.items():
        rows.append(f"| {op if op == 'none' else f'`{op}`'} | {', '.join(names)} |")
    return "\n".join(rows)


def architectures() -> str:
    """Return the table of architectures: name in configurations, class, op, kernels and paper."""
    rows = [
        "| architecture | configuration | class | op | kernels | paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in ENTRIES.items():
        fixed = ", ".join(f"{key}={value!r}" for key, value in entry.fixed.items())
        paper = entry.paper
        if paper[0].isdigit():
            paper = f"[{paper}](https://arxiv.org/abs/{paper})"
        made = f"`{entry.layer.__name__}`" + (f" with `{fixed}`" if fixed else "")
        op = f"`{entry.op}`" if entry.op else ""
        rows.append(f"| {entry.title} | `{name}` | {made} | {op} | {kernels(entry)} | {paper} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """Return the text of README.md with the tables of today."""
    for name, table in (("ops", ops()), ("architectures", architectures())):
        start, end = (f"<!-- --8<-- [{side}:{name}] -->" for side in ("start", "end"))
        between = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        text, count = between.subn(f"{start}\n{table}\n{end}", text)
        if count != 1:
            raise ValueError(f"README.md must contain {start} ... {end} once, got {count} times")
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
