"""Checks of the cell that is passed to `nonlinear_scan`."""

import inspect
from typing import Any

import jax

from seqjax.ops.core import checks
from seqjax.types import PyTree


def check_signature(op: str, cell: Any, *arguments: Any) -> None:
    """Raise unless `cell` can be called with (params, h, x)."""
    text = f"{op}: `cell` must be a function of (params, h, x) or a seqjax.cells cell, got"
    if isinstance(cell, type) or not callable(cell):
        name = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
        raise ValueError(f"{text} {name}; make one, e.g. seqjax.cells.GRU(dim=4).")
    try:
        signature = inspect.signature(cell)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ValueError(f"{text} one of {signature}; define it with three arguments.") from None


def check_arrays(op: str, cell: Any, params: PyTree, xs: PyTree) -> None:
    """Raise unless the arrays fit the declaration of a `seqjax.cells` cell."""
    names, gates = getattr(cell, "recurrent", None), getattr(cell, "gates", None)
    if names is None or gates is None:
        return
    if not isinstance(params, dict) or not set(names) <= set(params):
        raise ValueError(
            f"{op}: `params` must be a dict with the entries {sorted(names)}, as"
            f" {type(cell).__name__} declares them, got {checks.describe_tree(params)}."
        )
    if isinstance(xs, jax.Array) and xs.ndim == 4 and xs.shape[2] != gates:
        raise ValueError(
            f"{op}: `xs` must have shape [B, T, {gates}, D], with the gates of"
            f" {type(cell).__name__}, got {list(xs.shape)}."
        )
