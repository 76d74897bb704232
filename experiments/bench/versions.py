"""Speed of another version of seqjax, such as a clone of an earlier commit, next to this one's.

    python -m experiments.bench --rounds=3 --tree=FOLDER versions

Worker processes of both versions run alternately, because two versions cannot be imported into one.
"""

import itertools
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from experiments.base.errors import UserError
from experiments.bench.tools import ONLY, SCAN_SHAPES, Table, answer, cpu_seconds, run_apart

TREE = flags.DEFINE_string(
    "tree", "", "versions: folder with the other version, such as a clone of an earlier commit."
)
HERE = pathlib.Path(__file__).parents[2]
SCAN = "linear_scan"
CALLS = 9  # of each candidate in a process
Row = tuple[str, tuple[int, ...]]  # name and shape; [B, T] if the name is in `cases.NAMES`


def bench_versions(rounds: int) -> None:
    """Compare the processor time of the version in `--tree` with that of this version.

    Ops that the version in `--tree` does not have are left out.
    """
    from experiments.bench import cases  # not above: workers import seqjax from the other folder

    tree = pathlib.Path(TREE.value).resolve()
    if not TREE.value or not (tree / "seqjax" / "__init__.py").exists():
        raise UserError(f"--tree={TREE.value}: must be a folder that contains seqjax/__init__.py")
    rows: list[Row] = [(SCAN, shape) for shape in SCAN_SHAPES]
    rows += [(name, (batch, 2048)) for name, batch in itertools.product(cases.NAMES, (1, 4))]
    table = Table("Processor time of the version in --tree over that of this version, float32")
    for row in rows:
        name, shape = row
        label = f"{name}, {list(shape)}" if name == SCAN else f"{name}, B={shape[0]}, T={shape[1]}"
        if label.startswith(ONLY.value) and (times := compare(tree, row, rounds)):
            table.row(label, times)


def compare(tree: pathlib.Path, row: Row, rounds: int) -> dict[str, float]:
    """Return the ratios of a row: the time of the version in `tree` over that of this version.

    Each time is the least of all calls in `rounds` processes. The result is empty if the version in
    `tree` does not have the op.
    """
    least: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {"JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "programs")}
        for _, version in itertools.product(range(rounds), (tree, HERE)):
            request = [str(version), *row]
            found = json.loads(run_apart(__name__, request, pathlib.Path(folder), env))
            if not found:
                return {}
            best = least.setdefault(str(version), found)
            least[str(version)] = {kind: min(found[kind], best[kind]) for kind in found}
    other, here = least[str(tree)], least[str(HERE)]
    return {kind: other[kind] / here[kind] for kind in here}


def _measure(tree: str, name: str, shape: list[int]) -> str:
    """Return the processor times of a row with the version in `tree`; runs in a worker process."""
    sys.path.insert(0, tree)
    import jax

    import seqjax
    from experiments.bench import cases

    if not pathlib.Path(seqjax.__file__).is_relative_to(tree):
        raise RuntimeError(f"seqjax was imported from {seqjax.__file__}, not from {tree}")
    if not hasattr(seqjax, name.split(",")[0]):
        return "{}"
    arrays: Any
    if name == SCAN:
        keys = jax.random.split(jax.random.key(0), 2)
        arrays = jax.random.uniform(keys[0], shape), jax.random.normal(keys[1], shape)
    else:
        arrays = cases.arrays(name, *shape)
    run = cases.by(None, name)
    both = cases.with_gradients(run)
    programs = {"forward": jax.jit(run), "with gradients": jax.jit(both)}
    return json.dumps(cpu_seconds({k: lambda f=f: f(*arrays) for k, f in programs.items()}, CALLS))


if __name__ == "__main__":
    answer(_measure)
