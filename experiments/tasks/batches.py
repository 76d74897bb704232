"""Resumable batches of a task's sequences, packed end to end or padded."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from experiments.base.errors import UserError
from experiments.tasks.examples import Source, Task
from experiments.tasks.labelled import Split


def of_task(
    task: Task, *, batch_size: int, seed: int, packed_length: int = 0
) -> grain.DatasetIterator:
    """Return endless batches of `inputs`, `targets`, `counted` and `segment_ids`, [B, T].

    By default a row contains one sequence, padded to the longest possible length. With
    `packed_length`, a row of this length contains several sequences, each with its segment id. A
    task's curriculum also puts several sequences into a row. Padding has segment id 0 and is not
    counted.
    """
    dataset = (
        grain.MapDataset.source(Source(task, seed))
        .seed(seed)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))
    )
    if not packed_length:
        longest = task.longest()
        return iter(dataset.map(lambda e: _padded(e, longest)).batch(batch_size))
    if packed_length < task.longest():
        raise UserError(
            f"config.data.packed_length={packed_length} is shorter than the longest sequence, "
            f"{task.longest()}"
        )
    if task.curriculum:
        raise UserError(
            "config.data.packed_length and config.task.curriculum are both set: give one of them"
        )
    packed = grain_experimental.FirstFitPackIterDataset(
        dataset.map(_without_ids),
        length_struct=dict.fromkeys(("inputs", "targets", "counted"), packed_length),
        num_packing_bins=batch_size,
    )
    return iter(packed.map(_window).batch(batch_size))


def _without_ids(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the segment ids of a single sequence; packing numbers the sequences of a row."""
    return {name: x for name, x in example.items() if name != "segment_ids"}


def _padded(example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    after = length - len(example["inputs"])
    return {name: np.pad(x, [(0, after)] + [(0, 0)] * (x.ndim - 1)) for name, x in example.items()}


def _window(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "inputs": packed["inputs"],
        "targets": packed["targets"],
        "counted": packed["counted"],
        "segment_ids": packed["inputs_segment_ids"],
    }


class _Labelled:
    """Grain source of sequences padded to a length, with masks and labels."""

    def __init__(self, split: Split, length: int) -> None:
        self._split = split
        self._length = length

    def __len__(self) -> int:
        return len(self._split.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self._split.inputs[int(index)][: self._length]
        after = [(0, self._length - len(x))] + [(0, 0)] * (x.ndim - 1)
        mask = np.arange(self._length) < len(x)
        return {"inputs": np.pad(x, after), "mask": mask, "label": self._split.labels[int(index)]}

    def __repr__(self) -> str:
        return f"_Labelled({len(self)} sequences of {self._length})"


def of_labelled(split: Split, *, length: int, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Return endless batches of `inputs` [B, T, ...], `mask` [B, T] and `label` [B].

    Sequences are shuffled in each epoch. Sequences longer than `length` are cut.
    """
    dataset = grain.MapDataset.source(_Labelled(split, length)).seed(seed).shuffle().repeat()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    return iter(dataset.to_iter_dataset(reading).batch(batch_size))


def in_order(split: Split, *, length: int, batch_size: int) -> Any:
    """Yield every sequence once, in batches of one shape; the last has rows with empty masks."""
    source = _Labelled(split, length)
    for start in range(0, len(source), batch_size):
        rows = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        rows += [rows[-1] | {"mask": np.zeros(length, bool), "label": np.int32(-1)}] * (
            batch_size - len(rows)
        )
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
