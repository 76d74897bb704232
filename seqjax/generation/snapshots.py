"""Snapshots of states in NumPy files."""

import os
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from seqjax.types import PyTree


def save_state(path: str | os.PathLike[str], state: PyTree) -> None:
    """Write a state to a NumPy file (`.npz`), one array for each leaf.

    States are trees of arrays, so Orbax and other checkpoint libraries save them too. Arrays in
    bfloat16 are stored by their bits, because NumPy files have no such dtype.

    Args:
      path: the file to write.
      state: a state of a layer or model, on one process.

    Returns:
      None.

    Raises:
      OSError: if the file cannot be written.

    Example:
      >>> import pathlib, tempfile, seqjax
      >>> layer = seqjax.layers.LRU(4)
      >>> state = layer.initial_state(1)
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
      >>> seqjax.save_state(path, state)
      >>> seqjax.load_state(path, like=state).shape
      (1, 4)
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays: dict[str, Any] = {_name(key, leaf): _bits(np.asarray(leaf)) for key, leaf in leaves}
    with pathlib.Path(path).open("wb") as file:
        np.savez(file, **arrays)


def load_state(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read a state that `save_state` wrote.

    Args:
      path: the file to read.
      like: a state with the same structure, shapes and dtypes, such as
        `model.initial_state(batch_size)`.

    Returns:
      The state.

    Raises:
      ValueError: if the file is no snapshot, or a leaf is missing or has another shape or dtype.
      OSError: if the file cannot be read.

    Example:
      >>> import pathlib, tempfile, seqjax
      >>> layer = seqjax.layers.LRU(4)
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
      >>> seqjax.save_state(path, layer.initial_state(3))
      >>> seqjax.load_state(path, like=layer.initial_state(3)).shape
      (3, 4)
    """
    arrays = _read(path)
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_name(key, leaf): leaf for key, leaf in leaves}
    if wanted.keys() != arrays.keys():
        different = sorted(wanted.keys() ^ arrays.keys())
        raise ValueError(
            f"load_state: the file must have the leaves of `like`, got a difference in"
            f" {', '.join(different)}; pass the initial state of the model that made the snapshot."
        )
    for name, leaf in wanted.items():
        found = arrays[name]
        if _is_foreign(leaf.dtype) and found.dtype.itemsize == leaf.dtype.itemsize:
            found = arrays[name] = found.view(leaf.dtype)
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise ValueError(
                f"load_state: {name} must be {leaf.dtype} of shape {list(leaf.shape)} as in `like`,"
                f" got {found.dtype} of shape {list(found.shape)}."
            )
    return jax.tree.unflatten(tree, [jax.numpy.asarray(arrays[name]) for name in wanted])


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile):  # pickles, arrays, other files
        raise ValueError(
            f"load_state: `path` must be a file that save_state wrote, got {os.fspath(path)!r} of"
            " another format."
        ) from None


def _is_foreign(dtype: Any) -> bool:
    """Return True for dtypes that NumPy files do not have, such as bfloat16."""
    return np.dtype(dtype).kind == "V"


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}") if _is_foreign(array.dtype) else array


def _name(path: Any, leaf: Any) -> str:
    """Return the name of a leaf in the file; that of bits ends with their dtype."""
    dtype = np.dtype(leaf.dtype)
    return f"state{jax.tree_util.keystr(path)}{f':{dtype}' if _is_foreign(dtype) else ''}"
