"""Runs of several processes, and runs that are killed while they save."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import train
from experiments.base import logs
from experiments.configs import lm
from experiments.training import checkpoints
from tests.experiments.scripts import KILLED

REPOSITORY = Path(__file__).parents[2]
STEPS = 10

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def quick(text, **overrides):
    config = lm.get_config("lru,quicktest")
    config.data.path = str(text)
    config.update({"steps": STEPS} | overrides)
    return config


def numbers(workdir):
    """Return every loss, gradient norm and held-out result of a run, in order."""
    names = ("step", "loss", "gradient_norm", "heldout_bits_per_byte")
    return [row[name] for row in logs.read_rows(workdir) for name in names if name in row]


def start(script, text, workdir, *arguments, devices=1):
    """Start a training process inside a wrapper script."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiled as the reference is, whose flags are in the environment.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')}"
        f" --xla_force_host_platform_device_count={devices}",
    }
    command = [
        sys.executable,
        "-c",
        script,
        f"--config={REPOSITORY}/experiments/configs/lm.py:lru,quicktest",
        f"--config.steps={STEPS}",
        f"--config.data.path={text}",
        f"--workdir={workdir}",
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def outputs(processes, seconds=300):
    """Return the output of the processes and end all of them."""
    try:
        return [process.communicate(timeout=seconds)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()


_STOPPED = """
import os, signal, sys
from experiments import train
from experiments.base import cli, logs

step, taken = logs.Progress.step, iter(range(1, 100))
def stopping(self):
    step(self)
    if next(taken) == 3 and "--process_id=1" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
logs.Progress.step = stopping
sys.exit(cli.run(train.define_flags, train.main))
"""


def two_processes(script, text, workdir):
    """Start two processes with two devices each on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        start(
            script,
            text,
            workdir,
            "--config.mesh=data=2,sequence=2",
            "--config.data.streams=2",
            f"--coordinator=localhost:{port}",
            "--num_processes=2",
            f"--process_id={number}",
            devices=2,
        )
        for number in range(2)
    ]


def test_two_processes_are_stopped_then_killed_and_one_goes_on(text, tmp_path):
    """Stop both processes by SIGTERM to one, kill both, then finish the run with one process."""
    config = quick(text)
    config.data.streams = 2
    train.train(config, tmp_path / "one")

    workdir = tmp_path / "two"
    processes = two_processes(_STOPPED, text, workdir)
    printed = outputs(processes)
    assert [p.returncode for p in processes] == [128 + signal.SIGTERM] * 2, printed
    # The signal came at step 3; processes synchronize every log_every = 2 steps.
    assert "stopped at step 4" in printed[0]

    processes = two_processes(KILLED, text, workdir)
    printed = outputs(processes)
    assert -signal.SIGKILL in [p.returncode for p in processes], printed
    assert "resumed at step 4" in printed[0]
    assert numbers(workdir)[-3] == 8

    train.train(config, workdir)
    np.testing.assert_allclose(numbers(workdir), numbers(tmp_path / "one"), rtol=2e-5)


_KILLED_WHILE_SAVING = """
import os, signal, sys
from experiments import train
from experiments.base import cli

def killing(rename):
    def before(source, target, *args, **keywords):
        if os.path.basename(str(target)) == "10":  # All of it is written, but for its name.
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **keywords)
    return before
os.rename, os.replace = killing(os.rename), killing(os.replace)
sys.exit(cli.run(train.define_flags, train.main))
"""


def test_a_kill_while_saving_leaves_the_checkpoint_before(text, tmp_path):
    reference = tmp_path / "reference"
    train.train(quick(text), reference)
    workdir = tmp_path / "killed"
    process = start(_KILLED_WHILE_SAVING, text, workdir)
    printed = outputs([process])
    assert process.returncode == -signal.SIGKILL, printed
    left = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert "10" not in left
    assert any(name.startswith("10.") for name in left), left  # half of it is there
    assert checkpoints.load_for_inference(str(workdir), "latest")[3] == 5

    train.train(quick(text), workdir)
    assert numbers(workdir) == numbers(reference)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "5"]
