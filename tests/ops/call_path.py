"""Length of an op's call path: function calls and changes of file inside the repository."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from seqjax.ops.core import linalg

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("seqjax", "pallas_kernels"))


def count_calls(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Count the calls and the changes of file of the first call of `function(*args)`.

    A call is an event "call" of `sys.setprofile` whose code lies in `seqjax/` or
    `pallas_kernels/`. Generator expressions, comprehensions and lambdas count as the interpreter
    counts them, so the numbers of Python 3.12 and newer, which inline comprehensions, are
    smaller. A change of file is a call whose code lies in another file than the code of the call
    before; returns do not count. Calls of JAX and of other libraries are ignored.

    JAX's caches are cleared before, so that tracing and lowering are counted. Pass concrete
    arrays: only on them does the call also lower and run the program.

    Returns:
      (calls, changes of file).
    """
    files: list[str] = []

    def record(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            files.append(frame.f_code.co_filename)

    jax.clear_caches()
    for cached in (linalg._along_rows, linalg._down_columns):
        cached.cache_clear()
    outer = sys.getprofile()
    sys.setprofile(record)
    try:
        jax.block_until_ready(function(*args))
    finally:
        sys.setprofile(outer)
    changes = sum(before != after for before, after in itertools.pairwise(files))
    return len(files), changes
