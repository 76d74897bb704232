"""The style of figures: colors, axes, and names at the ends of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Colors that color-blind readers can tell apart (Okabe and Ito, 2008), without yellow, which is
# hard to see on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "os^DvpX"
_SHADES = LinearSegmentedColormap.from_list("shades", ["white", COLORS[0]])
_LINE_HEIGHT = 11.0  # points between two names, in the font of size "small"


def look(index: int) -> dict[str, Any]:
    """Return color and marker of line `index`; the first 49 lines differ."""
    marker = MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
    return {"color": COLORS[index % len(COLORS)], "marker": marker, "markersize": 4}


def panels(count: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Any]]:
    """Return a figure of `size` inches, and its `count` axes next to each other.

    `options` are passed to `matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_map(
    axis: Any, values: Mapping[tuple[str, str], float], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw numbers from 0 to 1 as colored cells, each with its number; missing cells are gray.

    Args:
      axis: the axes.

      values: (row, column) -> number.

      rows: names of the rows, from above.

      columns: names of the columns.
    """
    cells = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    axis.imshow(np.ma.masked_invalid(cells), _SHADES, aspect="auto", vmin=0, vmax=1)
    axis.set_facecolor("0.9")
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "white" if value > 0.6 else "black"
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "small"}
            axis.text(j, i, f"{max(value, 0):.2f}", color=color, **place)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axis.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axis.tick_params(which="minor", length=0)
    axis.grid(False)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.spines[:].set_visible(False)


def name_lines(axis: Any, ends: Mapping[str, tuple[float, float]], colors: Sequence[str]) -> None:
    """Write names right of the axes, each joined to the last point of its line.

    Call it when scales and limits are final. Names keep the order of the points and do not overlap.

    Args:
      axis: the axes.

      ends: name -> (x, y), the last point of its line.

      colors: the color of each name.
    """
    figure = axis.get_figure()
    figure.draw_without_rendering()  # sets the limits and the layout
    to_fraction = axis.transAxes.inverted()
    heights = [to_fraction.transform(axis.transData.transform(end))[1] for end in ends.values()]
    gap = _LINE_HEIGHT / 72 * figure.dpi / axis.get_window_extent().height
    for (name, end), color, height in zip(ends.items(), colors, _apart(heights, gap), strict=True):
        axis.annotate(
            name,
            end,
            (1.03, height),
            xycoords="data",
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize="small",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "relpos": (0, 0.5)},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return the nearest heights in the same order with at least `gap` between two of them.

    Names that would be closer form a block around their mean. Blocks stay above the bottom of the
    axes, if there is room.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # (center, number of names), from below
    for i in order:
        center, count = heights[i], 1
        while blocks and center - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            below, more = blocks.pop()
            center = (center * count + below * more) / (count + more)
            count += more
            center = max(center, gap * (count - 1) / 2)
        blocks.append((center, count))
    placed = [center + gap * (k - (n - 1) / 2) for center, n in blocks for k in range(n)]
    return [placed[order.index(i)] for i in range(len(heights))]
