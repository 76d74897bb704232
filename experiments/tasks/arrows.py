"""Arrow pointing, a task on images of any size, after pLSTM (arXiv 2506.11997)."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.tasks.labelled import Split

CHANNELS = 3
DIRECTIONS = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b])


def generate(rng: np.random.Generator, count: int, size: int) -> Split:
    """Generate arrow pointing: does the arrow point to the circle?

    An arrow is a tail with a head next to it, in one of eight directions. The label is 1 if the
    circle is on the ray from the tail through the head, beyond the head. In half of the images with
    label 0, the circle is on a ray of another direction, so the label depends on the direction.

    Args:
      rng: the generator.
      count: number of images; half of the labels are 1.
      size: pixels of each side, at least 3.

    Returns:
      Images [count, size, size, 3] with the channels circle, tail and head, and labels [count].
    """
    labels = rng.permutation(np.arange(count, dtype=np.int32) % 2)
    places = np.zeros((count, CHANNELS, 2), np.int64)
    left = np.arange(count)
    while len(left):
        places[left], good = _draw(rng, labels[left], size)
        left = left[~good]
    images: Any = np.zeros((count, size, size, CHANNELS), np.float32)
    for channel in range(CHANNELS):
        images[np.arange(count), places[:, channel, 0], places[:, channel, 1], channel] = 1
    return Split(images, labels)


def _draw(rng: np.random.Generator, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the places of circle, tail and head, and return which of them fit."""
    count = len(labels)
    direction = rng.integers(0, 8, count)
    other = (direction + rng.integers(1, 8, count)) % 8
    toward = DIRECTIONS[np.where(labels == 1, direction, other)]
    tail = rng.integers(0, size, (count, 2))
    head = tail + DIRECTIONS[direction]
    on_a_ray = (labels == 1) | (rng.random(count) < 0.5)
    distance = rng.integers(2, size, (count, 1))
    anywhere = rng.integers(0, size, (count, 2))
    circle = np.where(on_a_ray[:, None], tail + distance * toward, anywhere)
    places = np.stack([circle, tail, head], axis=1)
    inside = ((places >= 0) & (places < size)).all(axis=(1, 2))
    away = np.abs(circle - tail).max(axis=1)
    pointed = (circle == tail + away[:, None] * DIRECTIONS[direction]).all(axis=1)
    return places, inside & (away > 1) & (pointed == (labels == 1))
