"""Safetensors files of a checkpoint folder, read a few rows of a tensor at a time."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The bytes of one read, and the bytes after which a file is mapped again. The pages of a mapped
# file that were read count as memory of the process until the file is unmapped.
_CHUNK = 1 << 24


class Tensors:
    """The tensors of a folder with one or several safetensors files.

    `names` maps each name to its file, its stored dtype and its shape. The files are opened one at
    a time.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._opened: tuple[pathlib.Path, Any] | None = None
        self._read = 0
        self._joined: dict[str, list[str]] = {}
        self._stacked: dict[str, list[str]] = {}
        self.names: dict[str, tuple[pathlib.Path, str, tuple[int, ...]]] = {}
        for path, listed in _files(folder):
            found = self._header(path)
            missing = sorted(set(listed or ()) - set(found))
            if missing:
                raise ValueError(
                    f"load: {path.name} must have the tensor `{missing[0]}`, which the index lists,"
                    " got none."
                )
            self.names |= found

    def close(self) -> None:
        """Unmap the open file."""
        self._opened = None

    def _open(self, path: pathlib.Path) -> Any:
        if self._opened is None or self._opened[0] != path or self._read > _CHUNK:
            self._opened, self._read = None, 0
            self._opened = (path, _safe_open(path))
        return self._opened[1]

    def _header(self, path: pathlib.Path) -> dict[str, tuple[pathlib.Path, str, tuple[int, ...]]]:
        opened = self._open(path)
        found = {}
        for name in opened.keys():  # noqa: SIM118, not a dictionary
            stored = opened.get_slice(name)
            found[name] = (path, stored.get_dtype(), tuple(stored.get_shape()))
        return found

    def join(self, names: list[str]) -> str:
        """Return the name of a tensor with the rows of several tensors, one after the other.

        Raises:
          ValueError: if a tensor is missing, or they differ in dtype or the shape of a row.
        """
        for name in names:
            if name not in self.names:
                raise ValueError(f"load: checkpoint must have the tensor `{name}`, got none.")
        path, dtype, first = self.names[names[0]]
        for name in names:
            _, other, shape = self.names[name]
            if (other, shape[1:]) != (dtype, first[1:]):
                raise ValueError(
                    f"load: tensor `{name}` must have the dtype and the rows of `{names[0]}`, got"
                    f" {other} of shape {list(shape)}."
                )
        joined = ", ".join(names)
        count = sum(self.names[name][2][0] for name in names)
        self._joined[joined] = names
        self.names[joined] = (path, dtype, (count, *first[1:]))
        return joined

    def stack(self, names: list[str]) -> str:
        """Return the name of a tensor with equal tensors along a new first axis.

        Raises:
          ValueError: if a tensor is missing.
        """
        for name in names:
            if name not in self.names:
                raise ValueError(f"load: checkpoint must have the tensor `{name}`, got none.")
        path, dtype, shape = self.names[names[0]]
        stacked = f"{names[0]}, ..., {names[-1]}"
        self._stacked[stacked] = names
        self.names[stacked] = (path, dtype, (len(names), *shape))
        return stacked

    def pieces(self, name: str) -> list[str] | None:
        """Return the tensors of a name that `stack` returned, else None."""
        return self._stacked.get(name)

    def blocks(
        self, name: str, rows: tuple[int, int], rest: tuple[slice, ...]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read stored[rows[0] : rows[1], *rest], in pieces of at most 16 MB or one row.

        Yields:
          The first row of a piece, counted from rows[0], and the piece.
        """
        if name in self._joined:
            start = 0
            for piece_name in self._joined[name]:
                count = self.names[piece_name][2][0]
                low, high = max(rows[0], start), min(rows[1], start + count)
                if low < high:
                    inner = (low - start, high - start)
                    for offset, piece in self.blocks(piece_name, inner, rest):
                        yield low - rows[0] + offset, piece
                start += count
            return
        if name in self._stacked:
            for i in range(*rows):
                piece_name = self._stacked[name][i]
                piece = self._open(self.names[piece_name][0]).get_slice(piece_name)[rest]
                self._read += piece.nbytes
                yield i - rows[0], piece[None]
            return
        path, dtype, shape = self.names[name]
        row_bytes = np.dtype(DTYPES[dtype]).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        count = max(_CHUNK // max(row_bytes, 1), 1)
        for start in range(rows[0], rows[1], count):
            stop = min(start + count, rows[1])
            piece = self._open(path).get_slice(name)[(slice(start, stop), *rest)]
            self._read += (stop - start) * row_bytes
            yield start - rows[0], piece


def _safe_open(path: pathlib.Path) -> Any:
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            'load: the package safetensors must be installed; run pip install -e ".[pretrained]".'
        ) from None
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {path.name} must be a complete safetensors file, got {error}; download it"
            " again."
        ) from None


def _files(folder: pathlib.Path) -> list[tuple[pathlib.Path, list[str] | None]]:
    """Return the safetensors files of a folder, each with the tensors that an index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, list[str]] = {}
        for tensor, name in _weight_map(index).items():
            files.setdefault(name, []).append(tensor)
        for name in files:
            if pathlib.Path(name).name != name or not (folder / name).is_file():
                raise ValueError(
                    f"load: {index.name} lists the file {name!r}, which must be in the folder"
                    f" {str(folder)!r}."
                )
        return [(folder / name, listed) for name, listed in sorted(files.items())]
    if single.is_file():
        return [(single, None)]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return [(others[0], None)]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    raise ValueError(
        f"load: folder {str(folder)!r} must have model.safetensors or"
        " model.safetensors.index.json, got "
        + (
            f"{pickles[0]}; pickle files can run code and are refused, convert it to safetensors."
            if pickles
            else "neither."
        )
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Return the file of each tensor that an index lists."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: {index.name} must have a `weight_map`, got {error!r}.") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(
            f"load: the `weight_map` of {index.name} must map each tensor to a file name, got"
            " another value."
        )
    return found


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    make: Any,
    shard_bytes: int,
) -> None:
    """Write tensors into one file, or into several files with an index.

    Args:
      folder: the folder, which exists.
      tensors: shape and dtype by name, in the order of the files.
      make: function that returns the array of a name; called for one file at a time.
      shard_bytes: largest size of a file, unless one tensor is larger.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    sizes, used = {}, 0
    for name, (shape, dtype) in tensors.items():
        sizes[name] = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and used + sizes[name] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += sizes[name]
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {n: f for f, shard in zip(files, shards, strict=True) for n in shard},
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for file, shard in zip(files, shards, strict=True):
        # Readers of other libraries look for the format "pt".
        arrays = {name: make(name) for name in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
