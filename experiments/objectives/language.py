"""Objective of runs on text: a byte-level language model, its loss and its held-out metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import seqjax
from experiments.base import build, devices
from experiments.base.errors import UserError, check_positive
from experiments.data import corpus as corpora
from experiments.data import pipeline
from experiments.objectives import heldout
from experiments.objectives.whole import WholeModel


class NextByte(WholeModel):
    """A byte-level language model and its loss, without data.

    Attributes:
      model: the language model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Convert a batch of the pipeline to the arguments of the loss."""
        return {
            "inputs": batch["inputs"].astype(jnp.int32),
            "targets": batch["targets"].astype(jnp.int32),
            "reset": seqjax.segment_starts(batch["segment_ids"]),
        }

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean nats per byte."""
        logits, _ = model.apply(
            params, batch["inputs"], reset=batch["reset"], sequence_axis=sequence_axis
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        return nats if sequence_axis is None else jax.lax.pmean(nats, sequence_axis)


class Text(NextByte):
    """Objective of a configuration without a task: predict each byte of a text."""

    metric = "heldout_bits_per_byte"
    lower_is_better = True
    unit = "bytes"
    curve = "bits_per_byte"

    def __init__(self, config: ConfigDict) -> None:
        check_positive(config.data, "shuffle_windows", "streams")
        check_positive(config.eval, "lanes", "bytes", "final_bytes")
        self._times = config.eval.get("times", 1)
        if self._times < 1 or self._times.bit_count() != 1:
            raise UserError(
                f"config.eval.times={self._times}: must be a power of two; 1 disables the test of "
                "longer sequences"
            )
        self._config = config
        self._corpus = pipeline.load_corpus(config.data)
        self.name = self._corpus.name
        self.fingerprint = self._corpus.fingerprint
        self._heldout_bytes = sum(map(len, self._corpus.heldout))
        super().__init__(build.build_model(config.model))
        self.batch_shape = (config.data.batch_size, config.data.length)

    def batches(self, rows: Any) -> pipeline.Streams:
        """Return `pipeline.train_batches` of the run's text."""
        data = self._config.data
        return pipeline.train_batches(
            self._corpus.train,
            length=data.length,
            batch_size=data.batch_size,
            seed=self._config.seed,
            shuffle_windows=data.shuffle_windows,
            streams=data.streams,
            rows=rows,
        )

    def log(self, nats: float) -> dict[str, float]:
        """Return the loss in bits per byte."""
        return {"bits_per_byte": nats / math.log(2)}

    def make_evaluate(
        self, device_mesh: devices.DeviceMesh
    ) -> Callable[[Any, bool], dict[str, Any]]:
        """Return `evaluate(params, final)`: bits per byte, and those of compressors if final.

        If `config.eval.times` is above 1, the final result has the bits per byte of sequences up to
        that many training lengths. For these, `config.eval.options` replaces options of the layers.
        """
        evaluation = self._config.eval
        measure = heldout.make_evaluate(
            self.model,
            lanes=evaluation.lanes,
            length=self._config.data.length,
            device_mesh=device_mesh,
        )
        by_length = self._make_by_length(device_mesh) if self._times > 1 else None

        def evaluate(params: Any, final: bool) -> dict[str, Any]:
            limit = evaluation.final_bytes if final else evaluation.bytes
            documents = corpora.take_bytes(self._corpus.heldout, limit)
            bits = measure(params, documents)
            if final:
                result = heldout.report(bits, documents, self._heldout_bytes)
                return result | (by_length(params) if by_length else {})
            return {
                "heldout_bits_per_byte": bits,
                "heldout_bytes": sum(map(len, documents)),
            }

        return evaluate

    def _make_by_length(self, device_mesh: devices.DeviceMesh) -> Callable[[Any], dict[str, float]]:
        evaluation = self._config.eval
        model = self._config.model.copy_and_resolve_references()
        with model.unlocked():
            model.options.update(evaluation.options)
        return heldout.make_by_length(
            build.build_model(model),
            corpora.take_bytes(self._corpus.heldout, evaluation.final_bytes),
            lanes=evaluation.lanes,
            length=self._config.data.length,
            times=self._times,
            device_mesh=device_mesh,
        )

    def coverage(self, result: dict[str, Any]) -> str:
        """Describe which held-out bytes were read; "" if the log does not have the number."""
        if "heldout_bytes" not in result:
            return ""
        return f"{heldout.coverage(result['heldout_bytes'], self._heldout_bytes)} bytes"

    def describe(self, result: dict[str, Any]) -> str:
        """Return a result of `evaluate` as a line of text."""
        if "gzip_bits_per_byte" in result:
            return heldout.format_report(result)
        bits = result["heldout_bits_per_byte"]
        return f"held-out bits per byte {bits:.3f} on {self.coverage(result)}"


def require_text(config: ConfigDict, what: str) -> None:
    """Raise an error if the run is on a task instead of text."""
    if "task" in config:
        raise UserError(
            f"{what} requires a run on text; this run is on the task {config.task.name}"
        )
