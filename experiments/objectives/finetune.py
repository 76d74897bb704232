"""Objective of fine-tuning: the next token of a published model, with all weights or adapters."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import seqjax
from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError, check_positive
from experiments.data import finetuning, pipeline, tokens
from experiments.objectives.losses import counted_mean, counted_nats, perplexity
from experiments.objectives.published import one_line
from seqjax import pretrained, sharding
from seqjax.pretrained import hub

_SAMPLE = 1 << 20  # bytes of a file of weights to hash at its start, and at its end


class NextToken:
    """A published language model and its loss, without data.

    Attributes:
      model: the language model.
      adapter: its low-rank adapters, or None if all parameters are trained.
      frozen: parameters that are not trained: those of the model if it has an adapter.
    """

    def __init__(self, model: pretrained.PretrainedModel, rank: int, alpha: float) -> None:
        """Make adapters of a rank; 0 trains all parameters."""
        self.model = model
        self.adapter = pretrained.LoRA(model, rank, alpha) if rank else None
        self.frozen: Any = None

    @property
    def trained(self) -> Any:
        """Return the model or its adapters, which have the shapes, axes and roles to train."""
        return self.adapter or self.model

    def merge(self, params: Any, frozen: Any) -> Any:
        """Return the parameters of the model from the trained and the frozen ones."""
        return params if self.adapter is None else self.adapter.merge(frozen, params)

    def prepare(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Convert segment ids to resets."""
        reset = seqjax.segment_starts(batch["segment_ids"])
        return {name: batch[name] for name in tokens.FEATURES} | {"reset": reset}

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean nats per counted token."""
        return counted_mean(model, params, batch, sequence_axis)


class FineTune(NextToken):
    """Objective of a configuration with a checkpoint: predict the tokens of a file."""

    metric = "heldout_loss"
    lower_is_better = True
    unit = "tokens"
    curve = "loss"

    def __init__(self, config: ConfigDict) -> None:
        """Check the checkpoint and the data; read no weights."""
        chosen, data = config.model, config.data
        check_positive(data, "length", "batch_size", "shuffle_windows", "streams")
        check_positive(config.eval, "windows", "final_windows")
        if chosen.lora_rank < 0:
            raise UserError(f"--lora_rank={chosen.lora_rank}: must be 0 or more")
        if not data.path:
            raise UserError("no --data: give a file of text, or a .jsonl file")
        self._config = config
        with one_line(chosen.checkpoint):
            self._folder = hub.find_folder(chosen.checkpoint)
            self._tokenizer = tokens.Tokenizer(self._folder, data.date)
            self._options = {
                "capacity": data.length,
                "scan": chosen.scan,
                "remat": chosen.remat,
            }
            model = pretrained.read_model(self._folder, chosen.dtype or None, **self._options)
            super().__init__(model, chosen.lora_rank, chosen.lora_alpha)
        corpus = finetuning.load(data.path, self._tokenizer, data.heldout_fraction)
        _check_size(corpus, data.length)
        for part in (corpus.train, corpus.heldout):
            ids = (document[name] for document in part for name in ("inputs", "targets"))
            tokens.check_vocabulary(ids, model.vocab_size)
        self._corpus = corpus
        heldout = pipeline.windows(corpus.heldout, data.length)
        counts = heldout["counted"].any(axis=1)
        self._heldout = {name: rows[counts] for name, rows in heldout.items()}
        self.fingerprint = corpus.fingerprint + _checkpoint_fingerprint(self._folder)
        self.name = corpus.name
        self.batch_shape = (data.batch_size, data.length)

    def load(self, device_mesh: DeviceMesh) -> Any:
        """Read the weights; return them if they are trained, else keep them in `frozen`.

        Trained weights are float32 and are converted to the model's dtype where they are used.
        """
        dtype = self.model.dtype if self.adapter else jnp.promote_types(self.model.dtype, "float32")
        with one_line(self._config.model.checkpoint):
            _, params = pretrained.load(self._folder, device_mesh.mesh, dtype, **self._options)
        if self.adapter is None:
            return params
        self.frozen = params
        return None

    def batches(self, rows: Any) -> pipeline.Streams:
        """Return packed windows of the training documents; see `pipeline.train_batches`."""
        data = self._config.data
        return pipeline.train_batches(
            self._corpus.train,
            length=data.length,
            batch_size=data.batch_size,
            seed=self._config.seed,
            shuffle_windows=data.shuffle_windows,
            streams=data.streams,
            rows=rows,
            convert=lambda document: document,
            features=tokens.FEATURES,
        )

    def log(self, nats: float) -> dict[str, float]:
        """Return the perplexity."""
        return {"perplexity": perplexity(nats)}

    def make_evaluate(self, device_mesh: DeviceMesh) -> Callable[[Any, bool], dict[str, Any]]:
        """Return `evaluate(params, final)`: the mean loss over held-out windows.

        Windows are packed as in training: a document that begins in an earlier window continues
        without its beginning.
        """

        model = sharding.constrain_activations(self.model, device_mesh.mesh)

        def nats(params: Any, batch: Any, sequence_axis: str | None) -> Any:
            return counted_nats(model, params, batch, sequence_axis)

        split = sharding.split_time(
            nats, device_mesh.mesh, in_specs=(P(), P(None, "sequence")), out_specs=P()
        )
        shardings = device_mesh.shardings

        def window(params: Any, frozen: Any, batch: Any) -> Any:
            return split(self.merge(params, frozen), self.prepare(batch))

        run = jax.jit(window, out_shardings=None if shardings is None else shardings.replicated)
        rows = self.batch_shape[0]

        def evaluate(params: Any, final: bool) -> dict[str, Any]:
            limit = self._config.eval.final_windows if final else self._config.eval.windows
            count = min(limit, len(self._heldout["inputs"]))
            total, tokens_read = 0.0, 0
            for start in range(0, count, rows):
                part = {
                    name: _padded(x[start : min(start + rows, count)], rows)
                    for name, x in self._heldout.items()
                }
                loss, counted = run(params, self.frozen, device_mesh.put(part))
                total, tokens_read = total + float(loss), tokens_read + int(counted)
            return {"heldout_loss": total / tokens_read, "heldout_tokens": tokens_read}

        return evaluate

    def coverage(self, result: dict[str, Any]) -> str:
        """Describe which held-out tokens were read; "" if the log does not have the number."""
        count = result.get("heldout_tokens")
        whole = int(self._heldout["counted"].sum())
        if count is None:
            return ""
        return f"all {whole:,} tokens" if count == whole else f"{count:,} of {whole:,} tokens"

    def describe(self, result: dict[str, Any]) -> str:
        """Return a result of `evaluate` as a line of text."""
        loss = result["heldout_loss"]
        perplexity = self.log(loss)["perplexity"]
        return (
            f"held-out loss {loss:.4f} nats per token, perplexity {perplexity:.3f}, on"
            f" {self.coverage(result)}"
        )

    def export(self, params: Any, folder: str) -> None:
        """Write the model in its published format, with merged adapters and the tokenizer.

        The folder must be new or empty. It appears with all its files, so that an interrupted
        export leaves nothing that looks like a checkpoint.
        """
        dtypes = pretrained.abstract_params(self.model)

        @jax.jit
        def final(params: Any, frozen: Any) -> Any:
            whole = self.merge(params, frozen)
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), whole, dtypes)

        target = pathlib.Path(folder).expanduser().resolve()
        partial = target.with_name(f".{target.name}.partial-export")
        try:
            if partial.exists():  # of an interrupted export
                shutil.rmtree(partial)
            pretrained.save(self.model, final(params, self.frozen), partial)
            for pattern in hub.TEXT_FILES:
                for file in sorted(self._folder.glob(pattern)):
                    if file.name != "config.json" and not file.name.endswith(".index.json"):
                        shutil.copy(file, partial)
            partial.replace(target)
        except OSError as error:
            raise UserError(f"cannot write --export={folder}: {error.strerror}") from error


def _checkpoint_fingerprint(folder: pathlib.Path) -> str:
    """Return a hash of config.json and of a sample of the weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(size - _SAMPLE, 0)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def _check_size(corpus: finetuning.TokenCorpus, length: int) -> None:
    size = sum(len(document["inputs"]) for document in corpus.train)
    held = sum(int(document["counted"].sum()) for document in corpus.heldout)
    if size < length or not held:
        raise UserError(
            f"--data={corpus.name} is too small: {size} tokens to train on and {held} held out,"
            f" one window needs {length}; give more data or a smaller --config.data.length"
        )
