"""Tables of tensor names: how the tensors of a checkpoint are cut into parameters."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from seqjax.pretrained.files import Tensors

Layout = Literal["linear", "rows", "conv", "experts"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the parameters that are its rows, in order.

    | layout | stored | parameter |
    |---|---|---|
    | linear | [rows, in] | [in, rows] |
    | rows | [rows, ...] | [rows, ...] |
    | conv | [rows, 1, taps], last tap meets the present | [taps, rows], first tap does |
    | experts | [experts, rows, in] | [experts, in, rows] |

    With `groups` the rows of every parameter are cut into this number of equal runs. The tensor
    holds the first run of each parameter, then the second run of each, and so on.

    Attributes:
      name: the name; "@" stands for the prefix of the checkpoint.
      params: paths of the parameters, with dots.
      layout: the layout.
      groups: the number of runs.
      aliases: other names that are accepted when reading.
      shape: the stored shape, if the reference stores rows with extra axes of length 1.
      pieces: the stored tensors whose rows, one after the other, are those of this tensor, or with
        the layout `experts` the tensors [rows, in] of each expert; by default the tensor itself is
        stored.
      wide: whether the parameters are at least float32, as the reference requires.
    """

    name: str
    params: tuple[str, ...]
    layout: Layout = "linear"
    groups: int = 1
    aliases: tuple[str, ...] = ()
    shape: Shape | None = None
    pieces: tuple[str, ...] = ()
    wide: bool = False

    @property
    def writable(self) -> bool:
        """True if the sizes of the stored tensors follow from the parameters."""
        return not self.pieces or self.layout == "experts"

    def inside(self, stored: str, ours: str) -> "Tensor":
        """Return the tensor with prefixes before its names, such as those of a layer."""
        return dataclasses.replace(
            self,
            name=stored + self.name,
            params=tuple(ours + param for param in self.params),
            aliases=tuple(stored + alias for alias in self.aliases),
            pieces=tuple(stored + piece for piece in self.pieces),
        )

    def with_aliases(self, *aliases: str) -> "Tensor":
        """Return the tensor with these other names."""
        return dataclasses.replace(self, aliases=aliases)


def linear(name: str, *params: str, groups: int = 1, aliases: Iterable[str] = ()) -> Tensor:
    """Return the row of a linear map's weight, stored [out, in]."""
    return Tensor(name, params, groups=groups, aliases=tuple(aliases))


def rows(
    name: str,
    *params: str,
    aliases: Iterable[str] = (),
    shape: Shape | None = None,
    wide: bool = False,
    groups: int = 1,
) -> Tensor:
    """Return the row of a tensor that is stored as our parameters are: vectors and tables."""
    return Tensor(name, params, "rows", groups, tuple(aliases), shape, wide=wide)


def conv(name: str, *params: str) -> Tensor:
    """Return the row of a depthwise convolution's weight."""
    return Tensor(name, params, "conv")


def experts(name: str, *params: str) -> Tensor:
    """Return the row of a linear map's weights for all experts, stored [experts, out, in]."""
    return Tensor(name, params, "experts")


def each_expert(name: str, count: int, param: str) -> Tensor:
    """Return the row of a linear map's weights that are stored [out, in] for each expert.

    Args:
      name: the name; "{}" stands for the number of the expert.
      count: the number of experts.
      param: path of the parameter.
    """
    pieces = tuple(name.format(i) for i in range(count))
    return Tensor(name, (param,), "experts", pieces=pieces)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor together with the shapes of its parameters."""

    tensor: Tensor
    shapes: tuple[Shape, ...]

    def _row_axis(self) -> int:
        return 0 if self.tensor.layout == "rows" else -1

    @property
    def rows(self) -> int:
        """Number of rows of the stored tensor."""
        return sum(shape[self._row_axis()] for shape in self.shapes)

    @property
    def stored_shape(self) -> Shape:
        """Shape of the stored tensor."""
        if self.tensor.shape is not None:
            return self.tensor.shape
        if self.tensor.layout == "experts":
            return (self.shapes[0][0], self.rows, self.shapes[0][1])
        return (self.rows, *self._rest_shape())

    def accepts(self, shape: Shape) -> bool:
        """Return whether a stored tensor may have this shape; extra axes of length 1 are free."""
        wanted = self.stored_shape
        if self.tensor.shape is None:
            return shape == wanted
        return [n for n in shape if n != 1] == [n for n in wanted if n != 1]

    def each_stored(self) -> Iterator[tuple["Cut", tuple[int, ...]]]:
        """Yield the tensors to write, each with the index of its part of every parameter."""
        if not self.tensor.pieces:
            yield self, ()
            return
        for i, name in enumerate(self.tensor.pieces):
            tensor = dataclasses.replace(self.tensor, name=name, layout="linear", pieces=())
            yield Cut(tensor, tuple(shape[1:] for shape in self.shapes)), (i,)

    def _rest_shape(self) -> Shape:
        first = self.shapes[0]
        rest = {"linear": first[:-1], "rows": first[1:], "conv": (1, first[0])}
        return rest[self.tensor.layout]

    def runs(self, part: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first stored row, first row of the parameter, number of rows)."""
        groups, axis = self.tensor.groups, self._row_axis()
        sizes = [shape[axis] // groups for shape in self.shapes]
        for group in range(groups):
            start = group * sum(sizes) + sum(sizes[:part])
            yield start, group * sizes[part], sizes[part]

    def read(
        self, tensors: Tensors, name: str, part: int, index: tuple[slice, ...], out: np.ndarray
    ) -> None:
        """Read parameter[index] into `out`, with a conversion of the dtype."""
        shape = self.shapes[part]
        bounds = [entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True)]
        low, high = bounds[self._row_axis()]
        layout = self.tensor.layout
        if layout == "experts":
            before = sum(shape[-1] for shape in self.shapes[:part])
            stored_rows = slice(before + low, before + high)
            for at, piece in tensors.blocks(name, bounds[0], (stored_rows, index[1])):
                out[at : at + len(piece)] = np.swapaxes(piece, 1, 2)
            return
        if self.tensor.shape is not None:  # small arrays with extra axes
            stored_shape = tensors.names[name][2]
            everything = tuple(slice(None) for _ in stored_shape[1:])
            pieces = [piece for _, piece in tensors.blocks(name, (0, stored_shape[0]), everything)]
            whole = np.concatenate(pieces).reshape(self.rows, *self._rest_shape())
            kept = [whole[start : start + count] for start, _, count in self.runs(part)]
            out[...] = np.concatenate(kept)[index]
            return
        rest = index[:-1] if layout == "linear" else index[1:] if layout == "rows" else ()
        if layout == "conv":
            rest = (slice(None), slice(None))
        for start, first, count in self.runs(part):
            begin, end = max(first, low), min(first + count, high)
            if begin >= end:
                continue
            stored = (start + begin - first, start + end - first)
            for offset, piece in tensors.blocks(name, stored, rest):
                at = begin - low + offset
                if layout == "rows":
                    out[at : at + len(piece)] = piece
                elif layout == "linear":
                    out[..., at : at + len(piece)] = np.moveaxis(piece, 0, -1)
                else:
                    out[:, at : at + len(piece)] = piece[:, 0, ::-1].T[index[0]]

    def join(self, params: Iterable[np.ndarray]) -> np.ndarray:
        """Return the stored tensor of the parameters."""
        params = [np.asarray(param) for param in params]
        if self.tensor.layout == "experts":
            joined = np.concatenate([np.swapaxes(param, 1, 2) for param in params], axis=1)
            return np.ascontiguousarray(joined)  # the writer reads memory in order
        out = np.empty((self.rows, *self._rest_shape()), params[0].dtype)
        for part, param in enumerate(params):
            if self.tensor.layout == "linear":
                param = np.moveaxis(param, -1, 0)
            elif self.tensor.layout == "conv":
                param = param.T[:, None, ::-1]
            for start, first, count in self.runs(part):
                out[start : start + count] = param[first : first + count]
        return out.reshape(self.stored_shape)


def cuts(
    table: Iterable[Tensor], shapes: Mapping[str, Shape], unused: Iterable[str] = ()
) -> list[Cut]:
    """Return the table's tensors with the shapes of their parameters.

    Args:
      table: the tensors.
      shapes: the shape of each parameter of the model.
      unused: parameters that the table leaves out.

    Raises:
      ValueError: if the table leaves out a parameter or has one twice: an error of the library.
    """
    made = [Cut(row, tuple(shapes[param] for param in row.params)) for row in table]
    seen = [*unused, *(param for row in made for param in row.tensor.params)]
    if sorted(seen) != sorted(shapes):
        wrong = sorted(set(seen) ^ set(shapes)) or sorted({p for p in seen if seen.count(p) > 1})
        raise ValueError(f"load: the table of tensors must have each parameter once: {wrong[0]}.")
    return made
