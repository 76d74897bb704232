"""Training: every config, exact resume after any end, and the files a run leaves."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp
from matplotlib import figure

from experiments import evaluate, train
from experiments.base import logs
from experiments.base.build import build_model
from experiments.base.errors import UserError
from experiments.configs import common, lm
from experiments.data import pipeline
from experiments.objectives import heldout
from experiments.objectives.language import NextByte
from experiments.training import checkpoints, metrics, optimizer
from experiments.training.interrupt import Interrupt
from experiments.training.step import all_finite, make_init, make_train_step
from tests.experiments.scripts import KILLED

REPOSITORY = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def quick(text, **overrides):
    config = lm.get_config("lru,quicktest")
    config.data.path = str(text)
    config.update(overrides)
    return config


def losses(workdir):
    """Return the log without speeds, which must be equal in two runs."""
    rows = logs.read_rows(workdir)
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """Return an uninterrupted run of 12 steps."""
    workdir = tmp_path_factory.mktemp("reference")
    summary = train.train(quick(text, steps=12), workdir)
    return workdir, summary


QUICK = {"attention", "gru", "lru"}
# The first block has a lower bound of 0, and no earlier values that RWKV-7 could mix in. The next
# window reads the states of the Block-Recurrent Transformer, and the sequences have one window.
UNUSED = {
    "hgrn": {"lower_bound"},
    "hgrn2": {"lower_bound"},
    "rwkv7": {"v0", "v1"},
    "block_recurrent": {"state_gate", "state_out_bias"},
}
SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in sorted(common.MIXERS.keys() - QUICK))


@pytest.mark.parametrize("layer", [*sorted(QUICK), *SLOW])
def test_two_steps_of_every_config(layer, text):
    config = lm.get_config(f"{layer},quicktest")
    config.data.path = str(text)
    full = lm.get_config(layer)
    assert full.model.mixers == config.model.mixers
    assert set(full.to_dict()) == set(config.to_dict())

    build_model(full.model)
    model = build_model(config.model)
    schedule = optimizer.make_schedule(config.optimizer, 2)
    transform = optimizer.make_optimizer(config.optimizer, 2, model.param_roles())
    step = make_train_step(NextByte(model), transform, schedule)
    state = make_init(model, transform)(jax.random.key(0))
    before = jax.tree.map(np.array, state["params"])
    sizes = {name: config.data[name] for name in ("length", "batch_size", "shuffle_windows")}
    batches = pipeline.train_batches(pipeline.load_corpus(config.data).train, seed=0, **sizes)
    for index in range(2):
        state, metrics = step(state, next(batches), np.int32(index))
        assert math.isfinite(metrics["loss"])
        assert metrics["gradient_norm"] > 0
    same = jax.tree.map(lambda a, b: not (a != b).any(), before, state["params"])
    still = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(same) if leaf}
    assert still == UNUSED.get(layer, set())


def test_a_run_leaves_its_files(reference, text):
    workdir, summary = reference
    rows = losses(workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "heldout_bits_per_byte" in row] == [5, 10, 12]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "sample.txt").read_text()
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["step"] == 12
    # The newest two checkpoints are kept; the best one is in a separate folder.
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 12]
    bits = {r["step"]: r["heldout_bits_per_byte"] for r in rows if "heldout_bits_per_byte" in r}
    best = [int(p.name) for p in (workdir / "best").iterdir()]
    assert best == [min(bits, key=bits.__getitem__)]


def test_it_learns(text, tmp_path):
    config = quick(text, steps=60, eval_every=60, save_every=60, log_every=30)
    config.optimizer.learning_rate = 1e-2
    summary = train.train(config, tmp_path)
    assert summary["heldout_bits_per_byte"] < 5.0


@pytest.mark.slow
def test_a_finished_run_started_again_only_reports(reference, text, capsys):
    workdir, summary = reference
    before = losses(workdir)
    again = train.train(quick(text, steps=12), workdir)
    assert losses(workdir) == before
    assert again == summary == json.loads((workdir / "summary.json").read_text())
    assert summary["tokens_per_second"] > 0
    assert "resumed at step 12" in capsys.readouterr().out


@pytest.mark.slow
def test_an_old_log_without_newer_fields_is_reported(reference, text, tmp_path):
    """Read a log of an earlier version, without the speed and the size of the held-out data."""
    workdir = tmp_path / "old"
    shutil.copytree(reference[0], workdir)
    newer = ("heldout_bytes", "tokens_per_second")
    rows = [{k: v for k, v in row.items() if k not in newer} for row in logs.read_rows(workdir)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = train.train(quick(text, steps=12), workdir)
    assert again["heldout_bits_per_byte"] == reference[1]["heldout_bits_per_byte"]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_is_good_enough_ends_early(reference, text, tmp_path):
    bits = {
        row["step"]: row["heldout_bits_per_byte"]
        for row in losses(reference[0])
        if "heldout_bits_per_byte" in row
    }
    config = quick(text, steps=12, stop_at=bits[5])
    assert train.train(config, tmp_path)["step"] == 5
    assert train.train(config, tmp_path)["step"] == 5  # started again, it only reports
    config.stop_at = 0.0
    assert train.train(config, tmp_path)["step"] == 12
    assert losses(tmp_path) == losses(reference[0])


@pytest.mark.slow
def test_stop_and_resume_is_a_run_never_stopped(reference, text, tmp_path, monkeypatch):
    real, count = pipeline.train_batches, iter(range(1, 100))

    def raising(*args, **kwargs):
        batches = real(*args, **kwargs)
        take = batches.__class__.__next__

        class Raising(batches.__class__):
            def __next__(self):
                if next(count) == 7:
                    signal.raise_signal(signal.SIGTERM)
                return take(self)

        batches.__class__ = Raising
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", raising)
        stopped = train.train(quick(text, steps=12), tmp_path)
    assert stopped == {"exit_code": 128 + signal.SIGTERM, "step": 7}
    assert [row["step"] for row in losses(tmp_path)][-1] == 7

    summary = train.train(quick(text, steps=12), tmp_path)
    assert losses(tmp_path) == losses(reference[0])
    assert summary["heldout_bits_per_byte"] == reference[1]["heldout_bits_per_byte"]
    assert summary["tokens"] == reference[1]["tokens"]
    speed = summary["tokens"] / summary["train_seconds"]
    assert speed == pytest.approx(summary["tokens_per_second"])


@pytest.mark.slow
def test_timing_counts_the_steps_before_a_resume(text, tmp_path, monkeypatch):
    slow_clock = types.SimpleNamespace(perf_counter=itertools.count(step=1000.0).__next__)
    slow_clock.process_time = slow_clock.perf_counter
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "time", slow_clock)
        train.train(quick(text, steps=4), tmp_path)
    summary = train.train(quick(text, steps=8), tmp_path)
    assert summary["train_seconds"] > 1000
    assert 0 < summary["tokens_per_cpu_second"] < 1
    assert train.train(quick(text, steps=8), tmp_path) == summary


@pytest.mark.slow
def test_a_run_without_a_measured_step_has_no_speed(text, tmp_path):
    config = quick(text, steps=1)
    config.sample.num_bytes = 0
    summary = train.train(config, tmp_path)
    assert summary["tokens"] == 128
    assert not {"train_seconds", "tokens_per_second", "tokens_per_cpu_second"} & set(summary)
    assert summary["parameters"] == sum(
        math.prod(shape)
        for shape in jax.tree.leaves(
            build_model(config.model).param_shapes(), is_leaf=lambda x: isinstance(x, tuple)
        )
    )
    assert not (tmp_path / "sample.txt").exists()


def test_held_out_numbers_say_which_bytes_they_cover(text, tmp_path, capsys, monkeypatch):
    drawn = {}
    save = figure.Figure.savefig

    def record(self, path, **options):
        drawn["labels"] = self.axes[0].get_legend_handles_labels()[1]
        save(self, path, **options)

    monkeypatch.setattr(figure.Figure, "savefig", record)
    summary = train.train(quick(text, steps=5), tmp_path)
    total = summary["heldout_total_bytes"]
    assert summary["heldout_bytes"] == min(2048, total) > 512
    at_the_end = heldout.coverage(summary["heldout_bytes"], total)
    printed = capsys.readouterr().out
    assert re.search(rf"step 5: .* on the first 512 of {total:,} bytes\n", printed)
    assert re.search(rf"\nheld-out bits per byte \S+ on {at_the_end} bytes \(on the", printed)
    files = printed.splitlines()[-1].removeprefix(f"in {tmp_path}: ")
    assert files == "metrics.jsonl, curves.png, checkpoints, best, sample.txt"
    assert drawn["labels"][-2:] == [
        f"held-out, the first 512 of {total:,} bytes",
        f"held-out at the end, {at_the_end} bytes",
    ]


def test_the_second_signal_is_python_s_own():
    # A shell may have started the tests with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert (interrupt.signal, interrupt.exit_code) == (signal.SIGINT, 130)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_kill_and_resume_is_a_run_never_stopped(reference, text, tmp_path):
    arguments = [
        f"--config={REPOSITORY}/experiments/configs/lm.py:lru,quicktest",
        "--config.steps=12",
        f"--config.data.path={text}",
        f"--workdir={tmp_path}",
    ]
    # Same compiler flags as the reference, because losses are compared to the bit.
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | settings
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in losses(tmp_path)][-1] == 8
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [5]

    summary = train.train(quick(text, steps=12), tmp_path)
    assert losses(tmp_path) == losses(reference[0])
    assert summary["heldout_bits_per_byte"] == reference[1]["heldout_bits_per_byte"]


def test_a_row_cut_short_is_dropped(tmp_path):
    rows = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    assert logs.read_rows(tmp_path) == rows
    log = logs.RunLog(tmp_path, 1)
    log.write([{"step": 2, "loss": 0.3}])
    log.close()
    assert logs.read_rows(tmp_path) == [rows[0], {"step": 2, "loss": 0.3}]


@pytest.mark.slow
def test_another_model_or_other_text_is_refused(reference, text, tmp_path):
    workdir, _ = reference
    other = quick(text, steps=12)
    other.model.dim = 8
    other.sample.temperature = 0.5
    other.optimizer.learning_rate = 1e-5  # Fields that may change raise no error.
    with pytest.raises(UserError, match=r"\(model\.dim: 16 -> 8\)"):
        train.train(other, workdir)
    with pytest.raises(UserError, match=r"already: give --config\.steps=12"):
        train.train(quick(text, steps=11), workdir)

    copy = tmp_path / "text"
    copy.mkdir()
    for file in text.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    train.train(quick(copy, steps=1), tmp_path / "run")
    (copy / "0.txt").write_text("changed")
    with pytest.raises(UserError, match="text or the published model has changed"):
        train.train(quick(copy, steps=2), tmp_path / "run")


def test_nan_stops_and_keeps_the_last_good_checkpoint(text, tmp_path):
    config = quick(text, steps=12, save_every=1)
    config.optimizer.update(learning_rate=1e30, warmup_steps=1)
    with pytest.raises(UserError, match=r"became (nan|inf) at step (\d+) and training stopped"):
        train.train(config, tmp_path)
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert kept
    _, params, _, step = checkpoints.load_for_inference(str(tmp_path), "latest")
    assert step == max(kept)
    assert all_finite(params)
    assert all(math.isfinite(row["loss"]) for row in losses(tmp_path) if "loss" in row)


def test_parameters_that_are_not_finite_are_never_saved(text, tmp_path, monkeypatch):
    make = train.make_train_step

    def poisoned(*args):
        step = make(*args)

        def wrapped(state, batch, index, *args):
            state, metrics = step(state, batch, index, *args)
            if index == 3:
                state["params"] = jax.tree.map(lambda leaf: leaf * jnp.nan, state["params"])
            return state, metrics

        return wrapped

    monkeypatch.setattr(train, "make_train_step", poisoned)
    with pytest.raises(UserError, match=r"parameters became nan at step 4.*of step 2 .* is kept"):
        train.train(quick(text, save_every=2), tmp_path)
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [2]


def test_bits_per_byte_is_the_log_loss_of_every_byte(reference, text):
    """Compare with a plain loop that reads each lane byte by byte through `step`."""
    model, params, config, _ = checkpoints.load_for_inference(str(reference[0]), "latest")
    documents = [b"line 3 of file 4\n" * 3, b"x", b"naive \xff\x00 bytes"]
    lanes = 2
    measure = heldout.make_evaluate(model, lanes=lanes, length=config.data.length)
    bits = measure(params, documents)

    stream = b"".join(documents)
    starts = set(np.cumsum([0] + [len(d) for d in documents[:-1]]))
    width = -(-len(stream) // lanes)
    step = jax.jit(model.step)
    total = 0.0
    for lane in range(lanes):
        for index in range(lane * width, min((lane + 1) * width, len(stream))):
            if index in starts or index == lane * width:
                state, byte = model.initial_state(1), pipeline.DOCUMENT_START
            logits, state = step(params, jnp.array([byte]), state)
            total -= float(jax.nn.log_softmax(logits[0].astype(jnp.float32))[stream[index]])
            byte = stream[index]
    assert bits == pytest.approx(total / math.log(2) / len(stream), rel=1e-5)


def test_evaluate_agrees_with_training(reference, tmp_path, capsys):
    workdir, summary = reference
    result = evaluate.evaluate(str(workdir))
    for name in ("heldout_bits_per_byte", "heldout_bytes", "gzip_bits_per_byte", "step"):
        assert result[name] == summary[name]
    file = tmp_path / "other.txt"
    file.write_bytes(b"line 1 of file 1: 1\n" * 20)
    options = evaluate.Options(num_bytes=100)
    other = evaluate.evaluate(str(workdir), which="best", path=str(file), options=options)
    assert other["heldout_bytes"] == 100
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("bits per byte ")
    assert " on the first 100 of 400 bytes " in line
