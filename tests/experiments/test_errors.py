"""Bad input ends with a one-line hint, exit code 2 and no traceback."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

import orbax.checkpoint as ocp

from experiments import evaluate, generate, train
from experiments.base import cli, logs
from experiments.base.errors import UserError, is_disk_full, nearest
from experiments.training import checkpoints

CONFIG = "experiments/configs/lm.py"
REPOSITORY = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    """Run the commands in the root of the repository, as a user does."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some text to read " * 200)
    return file


def one_line(capsys, script, *arguments):
    """Run a script that must fail; return its error line."""
    code = cli.run(script.define_flags, script.main, [script.__name__, *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"give --config={cli.EXAMPLE_CONFIG}"),
        ([f"--config={CONFIG}:deltanit"], "did you mean 'deltanet'?"),
        ([f"--config={CONFIG}:deltanet,mamba"], "names the layers deltanet and mamba"),
        ([f"--config={CONFIG}:qiucktest"], "did you mean 'quicktest'?"),
        ([f"--config={CONFIG}", "--config.modle.dim=3"], "did you mean 'model'?"),
        ([f"--config={CONFIG}", "--config.data.pth=x"], "did you mean 'path'?"),
        ([f"--config={CONFIG}", "--config.zzz=1"], "unknown config field 'zzz'; --help lists all"),
        ([f"--config={CONFIG}", "--config.steps=abc"], "--config.steps=abc: must be an integer"),
        (
            [f"--config={CONFIG}", "--config.optimizer.learning_rate=fast"],
            "--config.optimizer.learning_rate=fast: must be a number",
        ),
        (
            [f"--config={CONFIG}", "--config.steps='many'"],
            "--config.steps='many': must be an integer",
        ),
        (
            [f"--config={CONFIG}:qqq"],
            f"--config={CONFIG}:qqq: unknown word 'qqq': known: aaren, atlas, attention",
        ),
        ([f"--config={CONFIG}:qqq"], " elman, ffm"),
        (["--config=experiments/configs/pod.py:mamba_1b,9k"], "_1b,9k: unknown word '9k'"),
        (["--helpful"], "Unknown command line flag 'helpful'"),
        ([f"--config={CONFIG}", "--workdr=x"], "workdir"),
        ([f"--config={CONFIG}", "lru"], "unexpected argument 'lru'"),
        (["--config=nowhere/lm.py"], "--config=nowhere/lm.py: cannot read the file"),
        (["--config=nowhere/lm.py", "--config.steps=1"], "--config=nowhere/lm.py: cannot read"),
    ],
)
def test_bad_commands(capsys, arguments, message):
    assert message in one_line(capsys, train, *arguments)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.mixers=mambo", "did you mean 'mamba'?"),
        ("model.mixers=lru,attention,lru", "multiple of the number of blocks"),
        ("model.depth=0", "depth"),
        ("model.options.deltanet.heads=3", "config.model.options.deltanet"),
        ("data.path=nowhere.txt", "does not exist"),
        ("data.length=0", "length"),
        ("data.length=100000", "too small"),
        ("data.batch_size=0", "batch_size=0 must be at least 1"),
        ("steps=0", "steps=0 must be at least 1"),
        ("optimizer.learning_rate=0", "learning_rate"),
    ],
)
def test_bad_values(capsys, tmp_path, text, field, message):
    line = one_line(
        capsys,
        train,
        f"--config={CONFIG}:quicktest",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={text}",
        f"--config.{field}",
    )
    assert message in line


def test_empty_text(capsys, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    common = [f"--config={CONFIG}:quicktest", f"--workdir={tmp_path / 'run'}"]
    line = one_line(capsys, train, *common, f"--config.data.path={tmp_path / 'empty'}")
    assert "is empty" in line


def test_a_workdir_that_is_a_file(capsys, text):
    line = one_line(capsys, train, f"--config={CONFIG}:quicktest", f"--workdir={text}")
    assert "cannot make the folder" in line


@pytest.mark.parametrize("script", [evaluate, generate])
def test_no_checkpoint(capsys, tmp_path, script):
    assert "no --workdir" in one_line(capsys, script)
    line = one_line(capsys, script, f"--workdir={tmp_path / 'nothing'}")
    assert "train first with python -m experiments.train" in line
    assert not (tmp_path / "nothing").exists()


def short_run(tmp_path, text):
    arguments = [
        "train",
        f"--config={CONFIG}:lru,quicktest",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={text}",
        "--config.steps=4",
        "--config.save_every=2",
    ]
    return cli.run(train.define_flags, train.main, arguments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_logging(capsys, tmp_path, text, monkeypatch):
    start = logs.RunLog.__init__

    def on_a_full_disk(self, workdir, step):
        start(self, workdir, step)
        self._file.close()
        self._file = Path("/dev/full").open("a")  # noqa: SIM115

    monkeypatch.setattr(logs.RunLog, "__init__", on_a_full_disk)
    assert short_run(tmp_path, text) == 2
    line = capsys.readouterr().err
    assert "the disk is full: free some space" in line
    assert line.count("\n") == 1


def test_a_full_disk_while_saving(capsys, tmp_path, text, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    save = ocp.CheckpointManager.save

    def save_then_fill(self, step, **kwargs):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
        return save(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_then_fill)
    assert short_run(tmp_path, text) == 2
    line = capsys.readouterr().err
    assert "the disk is full" in line
    assert line.count("\n") == 1
    # The checkpoint saved before the disk was full is usable.
    assert checkpoints.load_for_inference(str(tmp_path / "run"), "latest")[3] == 2


def test_what_is_no_user_error_keeps_its_traceback(monkeypatch):
    def broken(values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(evaluate.define_flags, broken, ["evaluate"])


def test_causes_of_a_full_disk_are_found():
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(error)
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert is_disk_full(ValueError("write failed: No space left on device [28]"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(None)


def test_nearest_lists_what_is_known_when_nothing_is_near():
    assert nearest("qqq", ["b", "a", "b"]) == "known: a, b"
    assert issubclass(UserError, Exception)


def test_the_exit_code_reaches_the_shell():
    """Run a command as a module in a separate process."""
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}:lruu"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --config={CONFIG}:lruu: unknown word 'lruu'")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_no_script_imports_tensorflow():
    code = (
        "import sys, experiments.train, experiments.evaluate, experiments.generate\n"
        "late = {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)\n"
        "sys.exit(str(late) if late else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
