"""Bits per byte of held-out text, compared with gzip and xz on the same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError
from experiments.data import pipeline
from seqjax import sharding

Evaluate = Callable[[Any, Sequence[bytes]], float]
Total = Callable[[Any, dict[str, np.ndarray], int], float]


def make_evaluate(
    model: Any,
    *,
    lanes: int,
    length: int,
    device_mesh: DeviceMesh | None = None,
    total: Total | None = None,
) -> Evaluate:
    """Return `evaluate(params, documents) -> bits per byte`, compiled once for all calls.

    With a `device_mesh`, evaluation runs on the mesh, with time split over the axis `sequence`.

    The documents are read in `lanes` lanes, `length` bytes at a time. The state is carried from
    window to window and cleared at the start of a document. Every byte is predicted exactly once,
    from the bytes before it in its document and lane. The result is the total log-loss divided by
    ln 2 and by the number of bytes: the size of an arithmetic code made with the model.

    `total` replaces the result of `make_total`.
    """
    total = make_total(model, device_mesh) if total is None else total

    def evaluate(params: Any, documents: Sequence[bytes]) -> float:
        streams = pipeline.lanes(documents, lanes, length)
        nats = total(params, streams, length)
        return float(nats / math.log(2) / sum(map(len, documents)))

    return evaluate


def window_nats(
    model: Any,
    params: Any,
    state: Any,
    part: dict[str, jax.Array],
    sequence_axis: str | None,
) -> tuple[Any, jax.Array]:
    """Return the state after a window of streams, and the log-loss of each lane in nats."""
    logits, state = model.apply(
        params,
        part["inputs"].astype(jnp.int32),
        state,
        reset=part["reset"],
        sequence_axis=sequence_axis,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, part["targets"].astype(jnp.int32)
    )
    sums = jnp.where(part["counted"], losses, 0.0).sum(axis=1)
    return state, sums if sequence_axis is None else jax.lax.psum(sums, sequence_axis)


def make_total(model: Any, device_mesh: DeviceMesh | None = None) -> Total:
    """Return `total(params, streams, length)`, the log-loss in nats of streams [lanes, T].

    The streams are those of `pipeline.lanes`. They are read `length` positions at a time, with a
    carried state.
    """
    by_window = _make_by_window(model, device_mesh)

    def total(params: Any, streams: dict[str, np.ndarray], length: int) -> float:
        return float(np.sum(by_window(params, streams, length)))

    return total


def make_by_length(
    model: Any,
    documents: Sequence[bytes],
    *,
    lanes: int,
    length: int,
    times: int,
    device_mesh: DeviceMesh | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Return `evaluate(params)`, the bits per byte of sequences of `times` training lengths.

    The model starts each sequence with a cleared state. `bits_per_byte_{n}` in the result is that
    of the bytes from n / 2 to n of all sequences, for n of 2, 4, ... times the training length. At
    the training length itself, it is that of all bytes up to n.

    Args:
      model: the language model.

      documents: text to cut into sequences; a rest of a document that is too short is left out.

      lanes: number of sequences that are read side by side; a last, smaller group is left out.

      length: the training length.

      times: a power of two.

      device_mesh: mesh to run on.
    """
    by_window = _make_by_window(model, device_mesh)
    span = times * length
    sequences = [
        text[start : start + span]
        for text in documents
        for start in range(0, len(text) - span + 1, span)
    ]
    starts = range(0, len(sequences) - lanes + 1, lanes)
    if not starts:
        raise UserError(
            f"config.eval.times={times}: the held-out text must have config.eval.lanes={lanes} "
            f"sequences of {span} bytes, got {len(sequences)}; set fewer lanes"
        )
    groups = [pipeline.lanes(sequences[start : start + lanes], lanes, length) for start in starts]

    def evaluate(params: Any) -> dict[str, float]:
        nats = np.concatenate([by_window(params, group, length) for group in groups], axis=1)
        bits = nats.mean(axis=1) / math.log(2) / length  # of a byte in each window
        return {
            f"bits_per_byte_{length << k}": float(bits[(1 << k) // 2 : 1 << k].mean())
            for k in range(times.bit_length())
        }

    return evaluate


def _make_by_window(
    model: Any, device_mesh: DeviceMesh | None
) -> Callable[[Any, dict[str, np.ndarray], int], np.ndarray]:
    """Return `by_window(params, streams, length)`, the log-loss in nats [windows, lanes]."""
    device_mesh = DeviceMesh("") if device_mesh is None else device_mesh
    shardings = device_mesh.shardings

    def nats(params: Any, state: Any, part: dict[str, jax.Array], sequence_axis: str | None) -> Any:
        return window_nats(model, params, state, part, sequence_axis)

    split = sharding.split_time(
        nats, device_mesh.mesh, in_specs=(P(), P(), P(None, "sequence")), out_specs=P()
    )
    # Every process sums over all lanes, so the sums must be replicated.
    window = jax.jit(
        split, out_shardings=None if shardings is None else (None, shardings.replicated)
    )

    def by_window(params: Any, streams: dict[str, np.ndarray], length: int) -> np.ndarray:
        count = streams["inputs"].shape[0]
        state = device_mesh.replicate(lambda: model.initial_state(count))
        sums = []
        for start in range(0, streams["inputs"].shape[1], length):
            part = {name: stream[:, start : start + length] for name, stream in streams.items()}
            state, lost = window(params, state, device_mesh.put(part))
            sums.append(lost)
        # In float64: a float32 total would lose digits over many windows.
        return np.asarray(jax.device_get(sums), np.float64)

    return by_window


def compressors(documents: Sequence[bytes]) -> dict[str, float]:
    """Return the bits per byte of gzip and xz at their strongest settings."""
    text = b"".join(documents)
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def report(bits: float, documents: Sequence[bytes], total: int) -> dict[str, Any]:
    """Return the numbers of an evaluation to print and store, including those of compressors.

    Args:
      bits: bits per byte of the model.

      documents: the evaluated documents, the first part of the text.

      total: bytes of the whole text.
    """
    others = compressors(documents)
    return {
        "heldout_bits_per_byte": bits,
        "heldout_bytes": sum(map(len, documents)),
        "heldout_total_bytes": total,
        "gzip_bits_per_byte": others["gzip"],
        "xz_bits_per_byte": others["xz"],
    }


def coverage(size: int, total: int) -> str:
    """Describe how many bytes of a text were read."""
    return f"all {total:,}" if size == total else f"the first {size:,} of {total:,}"


def format_report(result: dict[str, Any], number: str = "held-out bits per byte") -> str:
    """Format a report as one line of text; `number` is the name of the metric."""
    read = coverage(result["heldout_bytes"], result["heldout_total_bytes"])
    return (
        f"{number} {result['heldout_bits_per_byte']:.4f} on {read} bytes "
        f"(on the same bytes gzip {result['gzip_bits_per_byte']:.4f}, "
        f"xz {result['xz_bits_per_byte']:.4f})"
    )
