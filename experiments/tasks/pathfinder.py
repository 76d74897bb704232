"""Pathfinder: are two marked ends connected by a dashed curve? (arXiv 1805.08315, 2011.04006)"""

from __future__ import annotations

import numpy as np

# Dashes of a curve, pixels of a dash and of a gap, dashes of a distractor.
DASHES, DASH, GAP, SHORT = 6, 3, 2, 2
BEND = 0.35  # standard deviation of the angle between dashes, in radians


def generate(
    rng: np.random.Generator, count: int, size: int = 32, distractors: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images of two long curves and short distractors, all dashed and apart from each other.

    A label is 1 if both discs mark the ends of one curve, and 0 if they mark ends of two curves.

    Args:
      rng: the only source of randomness.

      count: number of images.

      size: pixels of a side.

      distractors: number of short curves.

    Returns:
      (images [count, size * size, 1] float32 in [0, 1], row after row; labels [count] int32).
    """
    labels = rng.integers(0, 2, count).astype(np.int32)
    images = [_image(rng, size, distractors, bool(label)) for label in labels]
    return np.stack(images).reshape(count, -1, 1).astype(np.float32), labels


def _image(rng: np.random.Generator, size: int, distractors: int, connected: bool) -> np.ndarray:
    while True:
        image, taken = np.zeros((size, size)), np.zeros((size + 4, size + 4), bool)
        curves = []
        for dashes in [DASHES] * 2 + [SHORT] * distractors:
            curve = _find_room(rng, taken, dashes)
            if curve is None:
                break
            rows, columns = curve[np.arange(len(curve)) % (DASH + GAP) < DASH].T
            image[rows, columns] = 0.6
            curves.append(curve)
        else:
            break
    first, second = curves[:2]
    for row, column in (first[0], first[-1] if connected else second[-1]):
        image[row - 1 : row + 2, column - 1 : column + 2] = 1
    return image


def _find_room(rng: np.random.Generator, taken: np.ndarray, dashes: int) -> np.ndarray | None:
    """Return the pixels [n, 2] of a random curve in free space, or None if 32 tries failed.

    `taken`, two pixels wider on each side than the image, marks pixels closer than three to a
    curve, so that no disc touches another curve. The new curve is added to it.
    """
    tries, size, length = 32, len(taken) - 4, dashes * (DASH + GAP) - GAP
    bends = rng.normal(0, BEND, (tries, dashes)) / (DASH + GAP)
    turns = np.repeat(bends, DASH + GAP, axis=1)[:, :length]
    angles = rng.uniform(0, 2 * np.pi, (tries, 1)) + np.cumsum(turns, axis=1)
    steps = np.cumsum(np.stack([np.sin(angles), np.cos(angles)], axis=2), axis=1)
    pixels = np.floor(rng.uniform(1, size - 1, (tries, 1, 2)) + steps).astype(int)
    inside = ((pixels >= 1) & (pixels < size - 1)).all(axis=(1, 2))
    rows, columns = np.moveaxis(np.clip(pixels, 0, size - 1), 2, 0)
    fits = np.flatnonzero(inside & ~taken[rows + 2, columns + 2].any(axis=1))
    if not len(fits):
        return None
    curve = pixels[fits[0]]
    for row, column in np.ndindex(5, 5):
        taken[curve[:, 0] + row, curve[:, 1] + column] = True
    return curve
