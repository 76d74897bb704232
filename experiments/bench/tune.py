"""Predicted times of TPU kernels with other block sizes, compiled without a TPU.

    python -m experiments.bench tune --only="linear_scan, B=8, T=4096, D=1000" --chips=v5e,v6e \\
        --output=blocks.json

The rows are those of `experiments.bench tpu`. Each candidate is compiled twice for each chip, which
takes a minute or more, so choose rows with `--only`. `--output` writes the fastest block sizes as
JSON: chip -> op -> row and dtype -> `block_sizes`, or null where the default is fastest.
"""

import collections
import itertools
import json
import pathlib
from typing import Any

from absl import flags

from experiments.base.errors import UserError, installed_version, nearest
from experiments.bench import tpu
from experiments.bench.tools import ONLY, Table
from experiments.compiled.chips import CHIPS

CHIP_NAMES = flags.DEFINE_list("chips", ["v5e", "v6e"], "Chips of the tune suite.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the fastest block sizes of tune.")

FEATURES, CHUNKS, HEADS = (512, 1024, 2048), (32, 64, 128, 256), (8, 16)
# Op -> steps of a block, and features or heads, of which those below D or H are tried, and all.
BLOCKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear_scan": ((128, 256, 512), FEATURES),
    "selective_scan": ((32, 64, 128), FEATURES),
    "linear_attention": (CHUNKS, HEADS),
    "delta_rule": (CHUNKS, HEADS),
    "generalized_delta_rule": (CHUNKS, HEADS),
}


def candidates(row: tpu.Row, dtype: str) -> list[tuple[int, int]]:
    """Return the block sizes to try, in addition to the default.

    Blocks have at most an eighth of T, because cycles are those of such a program.
    """
    shapes, (steps, widths) = row.shapes(row.length, dtype), BLOCKS[row.op]
    size = shapes["x"].shape[2] if "x" in shapes else shapes["v"].shape[2]
    widths = (*(n for n in widths if n < size), size)
    return list(itertools.product((n for n in steps if n <= row.length // 8), widths))


def rows() -> list[tuple[str, str]]:
    """Return the names and dtypes of the rows that `--only` selects."""
    pairs = ((name, dtype) for name, row in tpu.ROWS.items() for dtype in row.dtypes)
    found = [pair for pair in pairs if ", ".join(pair).startswith(ONLY.value)]
    found = [(name, dtype) for name, dtype in found if tpu.ROWS[name].op in BLOCKS]
    if not found:
        raise UserError(f"--only: no row of experiments.bench tpu starts with {ONLY.value!r}")
    return found


def bench_tune(rounds: int) -> None:
    """Print the predicted times of block sizes relative to the default, and write the fastest."""
    del rounds  # nothing is timed
    for chip in CHIP_NAMES.value:
        if chip not in CHIPS:
            raise UserError(f"--chips: unknown chip {chip!r}: {nearest(chip, CHIPS)}")
    print(f"libtpu {installed_version('libtpu', 'aot')}, no TPU: compiled ahead of time")
    best: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for name, dtype in rows():
        row, table = tpu.ROWS[name], Table(f"{name}, {dtype}: predicted ms, and over the default")
        fastest: dict[str, tuple[float, tpu.Blocks]] = {}
        default: dict[str, float] = {}
        errors: list[str] = []
        for block_sizes in (None, *candidates(row, dtype)):
            cells: dict[str, float | str] = {}
            for chip in CHIP_NAMES.value:
                try:
                    time = tpu.measure(name, dtype, chip, "pallas", block_sizes)["seconds"]
                except RuntimeError as error:
                    if block_sizes is None:
                        raise
                    cells |= {f"{chip}, ms": "not compiled", f"{chip} / default": ""}
                    errors.append(f"{chip}, {block_sizes}: {error}")
                    continue
                over = time / default.setdefault(chip, time)
                cells |= {f"{chip}, ms": f"{time * 1e3:.3f}", f"{chip} / default": over}
                if chip not in fastest or time < fastest[chip][0]:
                    fastest[chip] = time, block_sizes
            table.row(str(block_sizes or "default"), cells)
        print("", *errors, sep="\n")
        for chip, (_, block_sizes) in fastest.items():
            best[chip][row.op][f"{name}, {dtype}"] = block_sizes
    if OUTPUT.value is not None:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(best, indent=2) + "\n")
