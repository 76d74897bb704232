"""Prints the tables of the documentation that the code determines: python docs/tables.py."""

from seqjax.layers import REGISTRY, RNN, Entry, GateLoop, Longhorn
from seqjax.ops.core.backends import BACKENDS

PLATFORMS = {"tpu": "TPU", "cuda": "GPU"}


def kernels(entry: Entry) -> str:
    """Return the platforms with a Pallas kernel that supports the layer; see `BACKENDS`."""
    found = BACKENDS.get(entry.op)
    layer = entry.make(64, **entry.defaults(64, 4))
    # The kernels of `linear_attention` are real, those of `selective_scan` have exponential decays,
    # and that of `nonlinear_scan` is elementwise.
    if found is None or isinstance(layer, GateLoop | Longhorn):
        return ""
    if isinstance(layer, RNN) and layer.cell.structure == "dense":
        return ""
    named = "" if found.preferred else " (by name)"
    return ", ".join(PLATFORMS[platform] for platform in found.modules) + named


def architectures() -> str:
    """Return the table of architectures: name in configurations, class, op, kernels and paper."""
    rows = [
        "| architecture | configuration | class | op | kernels | paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in REGISTRY.items():
        fixed = ", ".join(f"{key}={value}" for key, value in entry.fixed.items())
        paper = entry.paper
        if paper[0].isdigit():
            paper = f"[{paper}](https://arxiv.org/abs/{paper})"
        made = f"`{entry.layer.__name__}`" + (f" with `{fixed}`" if fixed else "")
        op = f"`{entry.op}`" if entry.op else ""
        rows.append(f"| {entry.title} | `{name}` | {made} | {op} | {kernels(entry)} | {paper} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(architectures())
