"""Failures of the machine end commands with one line: paths, pipes, platforms, checkpoints."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

from experiments import evaluate, train
from experiments.base import cli, logs
from experiments.base.errors import UserError, system_error
from experiments.training import checkpoints
from experiments.training.interrupt import Interrupt

CONFIG = "experiments/configs/lm.py:lru,quicktest"
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def run_train(workdir, text):
    arguments = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.path={text}"]
    return cli.run(train.define_flags, train.main, ["train", *arguments, "--config.steps=2"])


def shell(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert run_train(workdir, text) == 0
    return workdir


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("workdir", ["/proc", "/proc/run"])
def test_proc(capsys, text, workdir):
    assert run_train(workdir, text) == 2
    line = capsys.readouterr().err
    assert workdir in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_workdir_that_cannot_be_written(capsys, tmp_path, text, monkeypatch, number):
    path = str(tmp_path / "metrics.tmp")

    def fail(self, workdir, step):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(logs.RunLog, "__init__", fail)
    assert run_train(tmp_path, text) == 2
    line = capsys.readouterr().err
    assert f"error: --workdir={tmp_path} must be a path" in line
    assert f"got {path}: {os.strerror(number)}" in line
    assert line.count("\n") == 1


def test_errors_of_the_file_system_are_found():
    denied = PermissionError(errno.EACCES, "Permission denied", "x")
    error = RuntimeError("saving failed")
    assert system_error(error) is None
    error.__cause__ = denied
    assert system_error(error) is denied
    written = ValueError('PERMISSION_DENIED: Error writing local file "/a/b": Permission denied')
    found = system_error(written)
    assert (found.errno, found.filename) == (errno.EACCES, "/a/b")
    assert system_error(OSError("handle is closed")) is None
    assert system_error(ValueError("no")) is None


def test_a_closed_pipe_ends_quietly():
    code = (
        "import sys\n"
        "from experiments import report\n"
        "from experiments.base import cli\n"
        "def main(values):\n"
        "    for _ in range(100_000): print('a line')\n"
        "    return 0\n"
        "sys.exit(cli.run(report.define_flags, main, ['report']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nowhere"])
def test_a_platform_that_is_not_there(finished, platform):
    if platform == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("this machine may have it")
    process = shell("experiments.evaluate", f"--workdir={finished}", JAX_PLATFORMS=platform)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: JAX_PLATFORMS={platform} must name platforms of this machine")
    assert err.count("\n") == 1


DAMAGES = {
    "params/d/*": lambda path: path.unlink(),
    "params/manifest.ocdbt": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "meta/metadata": lambda path: path.write_text('{"config":'),
    "meta/*": lambda path: path.write_text("{}"),
    "params/_METADATA": lambda path: path.write_text("{"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(capsys, finished, tmp_path, text, damage):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for file in (copy / "checkpoints" / "2").glob(damage):
        DAMAGES[damage](file)
    codes = [
        run_train(copy, text),
        cli.run(evaluate.define_flags, evaluate.main, ["evaluate", f"--workdir={copy}"]),
    ]
    assert codes == [2, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: checkpoint ")
        assert "/2 is damaged (" in line
        assert line.endswith("): delete this folder or start with a new --workdir")
        assert len(line) <= 200


def test_a_damaged_checkpoint_leaves_no_traceback(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for file in (copy / "checkpoints" / "2" / "params" / "d").iterdir():
        file.unlink()
    process = shell("experiments.evaluate", f"--workdir={copy}")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: checkpoint ")
    assert err.count("\n") == 1
    assert len(err) <= 201


def test_a_checkpoint_with_pages_of_reasons_takes_one_line(finished):
    with checkpoints._manager(finished / "checkpoints", None, read_only=True) as manager:
        error = checkpoints._damaged(manager, 2, "why " * 500)
    assert isinstance(error, UserError)
    assert len(f"error: {error}") <= 200


def test_a_signal_is_answered_at_once(capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt("saving a checkpoint in runs/x"):
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "\nSIGINT: saving a checkpoint in runs/x\n"
