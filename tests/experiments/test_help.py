"""`--help` of every command: description, two examples, flags, words and fields of a config."""

import importlib
import re
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

from experiments import train
from experiments.base import cli, fields, usage
from experiments.configs import classify, common, control, finetune, lm, pod, recall
from experiments.configs import state_tracking as state

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "experiments"
# Command -> module.
COMMANDS = {
    name.removesuffix(".__main__"): f"experiments.{name}"
    for name, path in sorted(
        (".".join(path.relative_to(FOLDER).with_suffix("").parts), path)
        for path in FOLDER.rglob("*.py")
    )
    if "cli.run(" in path.read_text()
}
CONFIGS = [lm.get_config("deltanet"), pod.get_config(), finetune.get_config()] + [
    module.get_config(task) for module in (recall, state, classify) for task in module.TASKS
]
CONFIGS += [control.get_config(game) for game in control.GAMES]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def show(capsys, command, *arguments):
    module = importlib.import_module(COMMANDS[command])
    takes_words = {"takes_words": True} if command == "bench" else {}
    assert cli.run(module.define_flags, module.main, [command, *arguments], **takes_words) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def test_all_commands_are_here():
    expected = "bench bench.weak_scaling evaluate finetune generate plan report sweep train"
    assert expected.split() == sorted(COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpshort", "--helpfull"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command, flag):
    text = show(capsys, command, flag)
    module = importlib.import_module(COMMANDS[command])
    assert text.startswith(module.__doc__.splitlines()[0])
    assert (
        len(re.findall(rf"^    python -m experiments\.{re.escape(command)}\b", text, re.MULTILINE))
        >= 2
    )
    assert "\nFlags:\n" in text
    assert max(map(len, text.splitlines())) <= 100
    assert ("--flagfile" in text) == (flag == "--helpfull")
    if command in ("train", "plan"):
        assert "experiments/configs/state_tracking.py\n" in text
        assert "--config.data.batch_size=" in text
        assert "sequences per training step" in text
        assert ("model.options.gated_deltanet.heads" in text) == (flag != "--helpshort")
        assert ("model.options.gateloop.heads" in text) == (flag == "--helpfull")


def test_help_shows_the_config_given(capsys):
    config = "--config=experiments/configs/state_tracking.py:parity,gru"
    text = show(capsys, "train", config, "--config.steps=7", "--help")
    assert "parity (default), modular_arithmetic, S3, S4, A5, S5" in text
    assert "eigenvalues in [-1, 1] for DeltaNet and Mamba" in text
    assert "--config.task.train_length=40" in text
    assert "--config.steps=7 " in text
    assert "--config.model.options.gru.state_dim=64" in text
    assert "options.deltanet" not in text


def test_words_are_listed_once():
    for module in (lm, recall, state, classify):
        words = [word for kind in module.KINDS.values() for word in kind]
        assert len(words) == len(set(words))
    assert common.layers("gru")[0] == "gru"
    assert set(common.layers("gru")) == set(common.MIXERS)


def test_every_field_has_a_comment_and_every_comment_a_field():
    names = {name for config in CONFIGS for name, _ in usage.leaves(config.to_dict())}
    assert [name for name in sorted(names) if not fields.comment(name)] == []
    options = {name.rpartition(".")[2] for name in names if name.startswith("model.options.")}
    assert set(fields.COMMENTS) <= names
    assert set(fields.OPTIONS) == options


def test_print_config_shows_the_overrides_and_trains_nothing(capsys, tmp_path):
    config = "--config=experiments/configs/lm.py:gru,quicktest"
    workdir = tmp_path / "run"
    text = show(
        capsys,
        "train",
        "--print_config",
        config,
        "--config.steps=7",
        "--config.model.options.gru.state_dim=5",
        f"--workdir={workdir}",
    )
    values = dict(re.findall(r"^(\S+) = (.*?)(?:  +# .*)?$", text, re.MULTILINE))
    assert values["steps"] == "7"
    assert values["model.options.gru.state_dim"] == "5"
    assert values["model.mixers"] == "'gru'"
    assert re.search(r"^data\.length = 32 +# steps of each training sequence", text, re.MULTILINE)
    assert "model.options.lru" not in text
    assert not workdir.exists()
    assert "--[no]print_config" in show(capsys, "train", "--help")


def test_default_workdirs_tell_runs_apart(tmp_path):
    config = lm.get_config("mamba")
    assert train.default_workdir(config) == "runs/lm-mamba"
    config.data.path = str(tmp_path / "novels.txt")
    assert train.default_workdir(config) == "runs/lm-mamba-novels"
    config.data.update(path="", tfds="imdb_reviews/plain_text")
    assert train.default_workdir(config) == "runs/lm-mamba-imdb_reviews-plain_text"


def test_cli_module_has_an_example_that_exists():
    path = cli.EXAMPLE_CONFIG.split(":")[0]
    assert (REPOSITORY / path).is_file()
