"""Sweeps lose no results, and every job has a configuration."""

import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

pytest.importorskip("ml_collections")

import seqjax
from experiments import report, sweep
from experiments.base import build, cli
from experiments.base.errors import UserError
from experiments.configs import common, lm
from experiments.sweeps import grids, jobs, texts
from experiments.training.interrupt import Interrupt

REPOSITORY = Path(__file__).parents[2]
JOBS = tuple(
    jobs.Job(f"{layer}, width {dim}", f"{grids.RECALL}:mqar,{layer},quicktest", {"model.dim": dim})
    for layer in ("lru", "gru")
    for dim in (16, 32)
)
TINY = jobs.Grid(
    "Tiny", JOBS, {"accuracy": "accuracy"}, "accuracy", {"lru, width 16": "0.9"}, "a paper"
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(grids.GRIDS, "tiny", TINY)


def flags_for(tmp_path, *more):
    results = tmp_path / "results.jsonl"
    return ["sweep", "--grids=tiny", f"--results={results}", f"--workdir={tmp_path}", *more]


class FakeRuns:
    """Fake training processes: their results and exit codes."""

    def __init__(self, ends=()):
        self.commands, self.ends = [], list(ends)

    def __call__(self, command, interrupt):
        del interrupt
        self.commands.append(command)
        code = self.ends.pop(0) if self.ends else 0
        if code == 0:
            folder = sweep.Path(command[-1].removeprefix("--workdir="))
            folder.mkdir(parents=True, exist_ok=True)
            accuracy = 0.5 + 0.01 * len(self.commands)
            (folder / "summary.json").write_text(json.dumps({"accuracy": accuracy}))
        return subprocess.CompletedProcess(command, code, "", "error: the loss became nan\n")


def test_a_sweep_goes_on_where_it_was(tiny, tmp_path, monkeypatch, capsys):
    first = FakeRuns([0, 3, 143])
    monkeypatch.setattr(sweep, "execute", first)
    arguments = flags_for(tmp_path, "--seeds=0,1", "--set=steps=2")
    assert cli.run(sweep.define_flags, sweep.main, arguments) == 130
    rows = sweep.read(tmp_path / "results.jsonl")
    assert [("summary" in row, row.get("error")) for row in rows] == [
        (True, None),
        (False, "error: the loss became nan"),
    ]
    assert rows[0]["overrides"] == {"model.dim": 16, "steps": 2, "seed": 0}
    assert rows[0]["set"] == {"steps": 2}
    assert set(rows[0]["versions"]) == {"python", "jax", "seqjax"}
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"grid": "ti')  # a run whose line was cut short by a kill must run again
    second = FakeRuns()
    monkeypatch.setattr(sweep, "execute", second)
    assert cli.run(sweep.define_flags, sweep.main, arguments) == 0
    assert len(second.commands) == 6
    assert second.commands[0] == first.commands[2]
    assert cli.run(sweep.define_flags, sweep.main, arguments) == 0
    assert len(second.commands) == 6
    assert "8 of 8 runs are in" in capsys.readouterr().out


def test_every_grid_has_a_question_and_a_short_answer():
    assert sorted(texts.TEXTS) == sorted(grids.GRIDS)
    for text in [texts.TRACKING_TEXT, *texts.TEXTS.values()]:
        assert text.question.endswith("?")
        assert text.setup.endswith(".")
        assert len(re.findall(r"\.( |$)", text.answer.removeprefix("Yes. "))) <= 2
        assert not text.answer or text.answer.endswith(".")


def test_two_sweeps_share_the_jobs(tiny, tmp_path, monkeypatch, capsys):
    """Finish the second job in another sweep, and let it still run the third one."""
    fcntl = pytest.importorskip("fcntl")
    names = [sweep.key("tiny", job.config, job.overrides | {"seed": 0}) for job in JOBS]
    locks = []

    class Shared(FakeRuns):
        def __call__(self, command, interrupt):
            if not self.commands:
                finished = {"grid": "tiny", "config": JOBS[1].config}
                finished |= {"overrides": JOBS[1].overrides | {"seed": 0}}
                (tmp_path / "results.jsonl").write_text(json.dumps(finished) + "\n")
                (tmp_path / names[2]).mkdir()
                locks.append((tmp_path / names[2] / "sweep.lock").open("w"))
                fcntl.flock(locks[0], fcntl.LOCK_EX)
            return super().__call__(command, interrupt)

    runs = Shared()
    monkeypatch.setattr(sweep, "execute", runs)
    assert cli.run(sweep.define_flags, sweep.main, flags_for(tmp_path)) == 0
    folders = [command[-1] for command in runs.commands]
    assert folders == [f"--workdir={tmp_path / names[k]}" for k in (0, 3)]
    assert capsys.readouterr().out.count("left to another sweep") == 2
    locks[0].close()
    assert cli.run(sweep.define_flags, sweep.main, flags_for(tmp_path)) == 0
    assert len(runs.commands) == 3


def test_a_grid_trains_every_layer_of_the_registry():
    every = grids.GRIDS["layers"].jobs
    assert [job.label for job in every] == list(seqjax.layers.REGISTRY)
    config = lm.get_config(every[0].config.split(":")[1])
    assert (config.steps, config.model.dim, config.model.options.lru.state_dim) == (200, 64, 64)


def test_bad_flags_end_with_one_line(tmp_path, tiny):
    values = ["sweep", "--grids=tyni"]
    assert cli.run(sweep.define_flags, sweep.main, values) == 2
    for more in ("--seeds=one", "--set=steps"):
        assert cli.run(sweep.define_flags, sweep.main, flags_for(tmp_path, more)) == 2
    missing = ["report", f"--results={tmp_path / 'none.jsonl'}"]
    assert cli.run(report.define_flags, report.main, missing) == 2


@pytest.mark.parametrize("name", sorted(grids.GRIDS))
def test_every_job_has_a_configuration(name):
    """Check that all words and fields exist and that no two jobs are equal."""
    grid, seen = grids.GRIDS[name], set()
    for job in grid.jobs:
        path, words = job.config.split(":")
        config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(
            words
        )
        config.update_from_flattened_dict(job.overrides)
        seen.add(sweep.key(name, job.config, job.overrides))
    assert len(seen) == len(grid.jobs)
    assert set(grid.published) <= {job.label for job in grid.jobs}


def size_of(config):
    """Return the number of parameters of a language model."""
    shapes = build.build_model(config.model).param_shapes()
    leaves = jax.tree.leaves(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    return sum(map(math.prod, leaves))


def size_of_text_model(layer, ratio, **options):
    """Return the number of parameters of `lm.py:LAYER` with an MLP ratio."""
    config = lm.get_config(layer)
    config.model.mlp_ratio = ratio
    config.model.options[layer].update(options)
    return size_of(config)


def test_models_of_text_are_of_one_size():
    every = grids.GRIDS["text"].jobs
    sizes = {
        job.label: size_of_text_model(job.config.split(":")[1], job.overrides["model.mlp_ratio"])
        for job in every
    }
    assert set(sizes) <= set(common.MIXERS) - {"hybrid"}
    assert all(set(job.overrides) == {"model.mlp_ratio"} for job in every)
    assert all(abs(size / 463_000 - 1) < 0.01 for size in sizes.values()), sizes


def test_hybrids_are_of_one_size():
    sizes = {}
    for job in grids.GRIDS["hybrid"].jobs:
        config = lm.get_config(job.config.split(":")[1])
        config.update_from_flattened_dict(job.overrides)
        sizes[job.label] = size_of(config)
    assert all(abs(size / 443_000 - 1) < 0.015 for size in sizes.values()), sizes


@pytest.mark.parametrize("layer", sorted(seqjax.layers.REGISTRY))
def test_every_layer_fits_the_size_of_text_models(layer):
    """Fit the MLP ratio, in steps of 8 features, and check that the size is within 1 %."""
    # In blocks of 4, the network that makes the blocks alone has more parameters.
    options = {"block_size": 2} if layer == "block_linear" else {}
    unit = 8 / lm.get_config(layer).model.dim
    least, more = (size_of_text_model(layer, n * unit, **options) for n in (1, 2))
    steps = 1 + round((463_000 - least) / (more - least))
    assert steps >= 1
    size = size_of_text_model(layer, steps * unit, **options)
    assert abs(size / 463_000 - 1) < 0.01


@pytest.mark.slow
def test_a_real_sweep(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(grids.GRIDS, "tiny", dataclasses.replace(TINY, jobs=JOBS[:1]))
    arguments = flags_for(tmp_path, "--set=steps=2", "--set=eval_every=2")
    assert cli.run(sweep.define_flags, sweep.main, arguments) == 0
    [row] = sweep.read(tmp_path / "results.jsonl")
    assert 0 <= row["summary"]["accuracy"] <= 1
    assert [step for step, _ in row["curve"]] == [2]


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_cannot_run_stops_the_sweep(code, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "execute", FakeRuns([code]))
    job = jobs.Job("bad", "experiments/configs/none.py", {})
    with pytest.raises(UserError, match=r"none\.py failed: the loss became nan"):
        sweep.run("tiny", job, {}, tmp_path, Interrupt())


# A sweep's run of one command, and a command that takes a second to save after SIGINT.
SWEEP = """
import sys
from experiments import sweep
from experiments.training.interrupt import Interrupt
with Interrupt(sweep.WAITING) as interrupt:
    done = sweep.execute([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], interrupt)
print("ended with", done.returncode, done.stdout)
"""
SAVING = """
import os, pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append(1))
(folder / "pid").write_text(str(os.getpid()))
(folder / "ready").touch()
while not signals:
    time.sleep(0.05)
(folder / "saving").touch()
end = time.time() + seconds
while time.time() < end:
    time.sleep(0.05)
print(len(signals), "signal")
sys.exit(130)
"""


def start_sweep(folder, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, SAVING, str(folder), str(seconds)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell may have started the tests with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupt_lets_the_run_save(tmp_path):
    """Send Ctrl-C to the sweep's process group; check that the run gets one signal."""
    process = start_sweep(tmp_path, 1)
    try:
        wait_for(tmp_path / "ready", process)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "ended with 130 1 signal" in output, errors
    assert "SIGINT: waiting for the current run to save its checkpoint" in errors


def test_a_second_interrupt_terminates_the_run(tmp_path):
    process = start_sweep(tmp_path, 300)
    try:
        wait_for(tmp_path / "ready", process)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(tmp_path / "saving", process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_stopped_sweep_keeps_the_run_that_ended(tiny, tmp_path, monkeypatch, capsys):
    class Interrupted(FakeRuns):
        def __call__(self, command, interrupt):
            interrupt.signal = signal.SIGINT
            return super().__call__(command, interrupt)

    monkeypatch.setattr(sweep, "execute", Interrupted())
    assert cli.run(sweep.define_flags, sweep.main, flags_for(tmp_path)) == 130
    assert len(sweep.read(tmp_path / "results.jsonl")) == 1
    assert "stopped; start the same command again to resume" in capsys.readouterr().out
