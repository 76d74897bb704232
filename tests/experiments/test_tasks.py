"""Runs on tasks: training, packing, exact resume and evaluation."""

import contextlib
import importlib
import json
import signal

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

import seqjax
from experiments import evaluate, generate, train
from experiments.base import build, cli, logs
from experiments.base.errors import UserError
from experiments.configs import classify, lm, pod, recall, state_tracking
from experiments.objectives import protocol
from experiments.tasks import batches, examples

pytestmark = pytest.mark.usefixtures("quick_compilation")
TASKS = [(m, task) for m in (state_tracking, recall, classify) for task in m.TASKS]


def quick(module, task, layer="lru"):
    return module.get_config(f"{task},{layer},quicktest")


@pytest.mark.parametrize(
    ("module", "task"),
    [
        pytest.param(m, task, id=task, marks=[] if task == "parity" else [pytest.mark.slow])
        for m, task in TASKS
    ],
)
def test_every_task_trains(module, task, tmp_path):
    full = module.get_config(task)
    config = quick(module, task)
    assert set(full.to_dict()) == set(config.to_dict())
    if task == "digits":
        pytest.importorskip("sklearn")
    if task == "time_series":
        series = "@classLabel true a b\n@data\n" + "1,2,3:a\n3,2,1:b\n" * 4
        for split in ("TRAIN", "TEST"):
            (tmp_path / f"Tiny_{split}.ts").write_text(series)
        config.task.path = str(tmp_path)
    given = contextlib.nullcontext()
    if task == "images":
        tfds = pytest.importorskip("tensorflow_datasets")
        config.task.tfds, given = "mnist", tfds.testing.mock_data(num_examples=8)
    config.update({"steps": 2, "eval_every": 2, "save_every": 2, "log_every": 1})
    with given:
        summary = train.train(config, tmp_path / "run")
    assert summary["step"] == 2
    metric = "error" if task == "linear_functions" else "accuracy"
    assert 0 <= summary[metric] <= (np.inf if metric == "error" else 1)
    rows = logs.read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if metric in row] == [2]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_an_accuracy_is_good_enough_when_it_is_high(tmp_path):
    config = quick(state_tracking, "parity")
    config.update({"steps": 4, "eval_every": 2, "stop_at": 0.01})
    assert train.train(config, tmp_path)["step"] == 2


@pytest.mark.slow
def test_packed_and_padded_losses_are_the_same():
    """Compare the loss of sequences in separate rows with that of packed sequences."""
    config = quick(state_tracking, "parity")
    config.update({"task": {"train_length": 12}, "data": {"batch_size": 24}})
    made = protocol.make(config)
    padded = next(made.batches(range(24)))
    source = examples.Source(made._task, config.seed)
    rows = [source[i] for i in range(24)]
    packed = {name: np.zeros((4, 96), x.dtype) for name, x in rows[0].items()}
    packed["segment_ids"] = np.zeros((4, 96), np.int32)
    for i, row in enumerate(rows):
        start = (packed["segment_ids"][i % 4] > 0).sum()
        for name, x in (row | {"segment_ids": np.full(len(row["inputs"]), i + 1)}).items():
            packed[name][i % 4, start : start + len(x)] = x
    params = made.model.init(jax.random.key(0))
    gradient = jax.value_and_grad(lambda p, b: made.loss(made.model, p, made.prepare(b), None))
    (one, by_one), (other, by_other) = gradient(params, padded), gradient(params, packed)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    for a, b in zip(jax.tree.leaves(by_one), jax.tree.leaves(by_other), strict=True):
        # float32 sums have another order; small entries are differences of large ones.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_packing_loses_nothing():
    config = quick(state_tracking, "parity")
    config.data.packed_length = 30
    made = protocol.make(config)
    stream = made.batches(range(4))
    source, seen = examples.Source(made._task, config.seed), set()
    for _ in range(6):
        batch = next(stream)
        assert batch["inputs"].shape == (4, 30)
        for row in range(4):
            ids = batch["segment_ids"][row]
            assert not batch["counted"][row][ids == 0].any()
            for i in range(1, ids.max() + 1):
                bits = batch["inputs"][row][ids == i]
                assert (batch["targets"][row][ids == i] == np.cumsum(bits) % 2).all()
                seen.add(bits.tobytes())
    assert {source[i]["inputs"].astype(np.int32).tobytes() for i in range(40)} <= seen
    config.data.packed_length = 5
    with pytest.raises(UserError, match="packed_length=5 is shorter than the longest sequence, 7"):
        protocol.make(config).batches(range(4))


@pytest.mark.slow
def test_a_run_resumed_is_the_run(tmp_path, monkeypatch):
    def config(steps):
        made = quick(recall, "induction_heads")
        made.update({"steps": steps, "eval_every": 4, "save_every": 2, "log_every": 2})
        made.optimizer.warmup_steps = 1
        return made

    train.train(config(4), tmp_path / "whole")
    whole = [r["loss"] for r in logs.read_rows(tmp_path / "whole") if "loss" in r]
    make = train.make_train_step

    def stopping(*args):
        step = make(*args)

        def stopped(state, batch, index, *args):
            if index == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch, index, *args)

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_train_step", stopping)
        assert train.train(config(4), tmp_path / "cut")["step"] == 2
    train.train(config(4), tmp_path / "cut")
    assert [r["loss"] for r in logs.read_rows(tmp_path / "cut") if "loss" in r] == whole


class Perfect:
    """A model that solves parity exactly."""

    def apply(self, params, inputs):
        return jax.nn.one_hot(jnp.cumsum(inputs, axis=1) % 2 ^ params, 2), None


def test_accuracy_is_what_it_says():
    config = quick(state_tracking, "parity")
    made = protocol.make(config)
    made.model = Perfect()
    evaluate = made.make_evaluate(None)
    perfect = {"accuracy_9": 1.0, "accuracy": 1.0, "chance": 0.5, "scaled_accuracy": 1.0}
    assert evaluate(0, True) == perfect | {"test_sequences": 8}
    assert made.describe(evaluate(0, False)).endswith("accuracy 1.000 (4 test sequences)")
    assert evaluate(1, True)["accuracy"] == 0


def test_classification_counts_every_test_sequence_once():
    made = protocol.make(quick(classify, "listops"))
    split = made._data.test
    rows = list(batches.in_order(split, length=20, batch_size=7))
    assert all(row["inputs"].shape == (7, 20) for row in rows)
    labels = np.concatenate([row["label"] for row in rows])
    assert labels[labels >= 0].tolist() == split.labels.tolist()
    assert not np.concatenate([row["mask"] for row in rows])[labels < 0].any()


@pytest.mark.slow
def test_evaluate_agrees_and_generate_declines(tmp_path):
    config = quick(state_tracking, "S3")
    summary = train.train(config, tmp_path)
    again = evaluate.evaluate(str(tmp_path))
    assert again["accuracy"] == summary["accuracy"]
    with pytest.raises(UserError, match="this run is on the task S3"):
        "".join(generate.generate(str(tmp_path), num_bytes=4))


@pytest.mark.parametrize("word", ["deltanet", "gated_deltanet", "hybrid"])
def test_the_word_says_whether_deltanet_is_gated(word):
    every = [lm, recall, classify, state_tracking]
    models = [build.build_model(module.get_config(word).model) for module in every]
    if word == "gated_deltanet":
        models += [build.build_model(pod.get_config("gated_deltanet_1b").model)]
    for model in models:
        blocks = [block.mixer for block in model.backbone.stack]
        mixers = [x for x in blocks if isinstance(x, seqjax.layers.DeltaNet)]
        assert mixers
        assert all(mixer.gated == (word != "deltanet") for mixer in mixers)


def test_bad_tasks_end_with_one_line():
    config = quick(state_tracking, "parity")
    config.task.name = "partiy"
    with pytest.raises(UserError, match=r"unknown task 'partiy': did you mean 'parity'\?"):
        protocol.make(config)
    with pytest.raises(UserError, match="names the tasks parity and S3"):
        state_tracking.get_config("parity,S3")
    for module, _ in TASKS:
        with pytest.raises(UserError, match=r"did you mean 'quicktest'\?"):
            module.get_config("quiktest")
    assert cli.EXAMPLE_CONFIG
    assert importlib.import_module("experiments.configs.common").MIXERS
