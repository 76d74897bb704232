"""Prints the tables of the documentation that the code determines: python docs/tables.py."""

from seqjax.layers import REGISTRY


def architectures() -> str:
    """Return the table of architectures: name in configurations, class, op and paper."""
    rows = ["| architecture | configuration | class | op | paper |", "|---|---|---|---|---|"]
    for name, entry in REGISTRY.items():
        fixed = ", ".join(f"{key}={value}" for key, value in entry.fixed.items())
        paper = entry.paper
        if paper[0].isdigit():
            paper = f"[{paper}](https://arxiv.org/abs/{paper})"
        made = f"`{entry.layer.__name__}`" + (f" with `{fixed}`" if fixed else "")
        op = f"`{entry.op}`" if entry.op else ""
        rows.append(f"| {entry.title} | `{name}` | {made} | {op} | {paper} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(architectures())
