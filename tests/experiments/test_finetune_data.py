"""Fine-tuning: data as the checkpoint defines them, exact resume, and safe exports."""

import json
import math

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")


from experiments import evaluate, finetune
from experiments.base import build
from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError
from experiments.data import chat, tokens
from experiments.objectives import losses, protocol, published
from experiments.training import checkpoints
from seqjax import pretrained
from tests.experiments.checkpoint import TEMPLATE, write_checkpoint
from tests.experiments.test_finetune import chat_of, quick, run, words

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    return write_checkpoint(tmp_path / "checkpoint", TEMPLATE)


@pytest.fixture
def chats(tmp_path):
    lines = [{"messages": chat_of([10, 11], [12 + i, 13] * 8)} for i in range(8)]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_settings_of_batches_in_a_tokenizer_change_nothing(folder):
    text = words([i % 31 for i in range(100)])
    expected, _ = tokens.Tokenizer(folder).text(text)
    change(
        folder / "tokenizer.json",
        truncation={
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 200},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "w0",
        },
    )
    tokenizer = tokens.Tokenizer(folder)
    assert tokenizer.text(text)[0]["inputs"].tolist() == expected["inputs"].tolist()
    assert len(tokenizer.encode(text)) == 100


def test_the_fingerprint_changes_with_all_that_makes_the_run(folder, chats):
    def fingerprint(**data):
        config = quick(folder, chats)
        config.data.update(data)
        return protocol.make(config).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    seen = {first}
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE.replace("w1 {{", "w6 {{"))
    seen.add(fingerprint())
    dated = TEMPLATE.replace("w1 {{", "w{{ 6 + strftime_now('%d') | int }} {{")
    change(folder / "tokenizer_config.json", chat_template=dated)
    seen.add(fingerprint())
    seen.add(fingerprint(date="2025-01-09"))
    assert len(seen) == 4
    model, params = pretrained.load(folder)
    params["embedding"] = params["embedding"].at[0, 0].add(1)
    (folder / "model.safetensors").unlink()
    pretrained.save(model, params, folder)
    assert fingerprint(date="2025-01-09") not in seen


def test_a_run_with_another_fingerprint_is_not_resumed(folder, chats, tmp_path):
    config = quick(folder, chats)
    meta = {"config": build.to_json(config), "fingerprint": "a"}
    checkpoints.check_same_run(tmp_path, meta, config, "a")
    with pytest.raises(UserError, match=r"changed since the checkpoint in .* was made") as caught:
        checkpoints.check_same_run(tmp_path, meta, config, "b")
    assert "\n" not in str(caught.value)


def test_the_date_of_templates_is_fixed(tmp_path):
    template = "{{ messages[0].content if messages else '' }}{{ strftime_now('%d %b %Y') }}"
    folder = write_checkpoint(tmp_path, template)
    messages = [{"role": "assistant", "content": "x"}]
    assert next(chat.Template(folder, "2025-01-31").render(messages))[0] == "x31 Jan 2025"
    with pytest.raises(ValueError, match=r"config\.data\.date must be such as 2025-01-01, got 'x'"):
        chat.Template(folder, "x")


def test_templates_get_no_tools_and_no_documents(tmp_path):
    template = (
        "{% if tools is not none or documents is not none %}tools {% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    made = chat.Template(write_checkpoint(tmp_path, template))
    assert next(made.render([{"role": "assistant", "content": "w5"}]))[0] == "w5"


def test_stop_tokens_of_the_text_model(folder):
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", text_config={"eos_token_id": 7}, eos_token_id=None)
    assert tokens.Tokenizer(folder).stop_tokens == (7,)
    for content, message in (
        ("[1]", "generation_config.json must be an object, got list"),
        ("{", "generation_config.json must be valid JSON"),
        ('{"eos_token_id": "w1"}', "`eos_token_id` must have integers >= 0, got"),
    ):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            tokens.Tokenizer(folder)


def test_tokens_outside_the_vocabulary_are_named(folder, chats, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words([i % 7 for i in range(900)]))
    change(folder / "generation_config.json", eos_token_id=[32])
    with pytest.raises(UserError, match=r"must be below vocab_size = 32 .*, got 32"):
        protocol.make(quick(folder, text))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["w31"] = 40
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="got 40; use the tokenizer of this checkpoint"):
        published.read_text(str(folder), words([5, 31, 6]), window=4, lanes=1, dtype=None)


def test_half_a_character_ends_with_one_line(folder, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w5"}\n{"text": "\\ud800"}\n')
    code, error = run(capsys, f"--checkpoint={folder}", f"--data={file}")
    assert code == 2
    assert "line 2: must be Unicode text, got \\ud800 without its pair" in error


def test_a_text_that_is_cut_must_be_utf_8_too(folder, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"w1 w2 \xff w3")
    for size in (0, 5):
        with pytest.raises(UserError, match="must be UTF-8 text, got another byte at position 6"):
            evaluate.evaluate_checkpoint(str(folder), str(file), evaluate.Options(num_bytes=size))
    assert losses.perplexity(710.0) == math.exp(700)


# Exports


def test_exports_are_whole_or_absent(folder, chats, tmp_path, monkeypatch):
    objective = protocol.make(quick(folder, chats, rank=0))
    params = objective.load(DeviceMesh(""))
    save, target = pretrained.save, tmp_path / "home" / "export"

    def stopped(model, params, path):
        save(model, params, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            objective.export(params, str(target))
    assert not target.exists()
    finetune._check_export(str(target), tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    objective.export(params, "~/export")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["export"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in target.iterdir()
    }
    with pytest.raises(UserError, match="cannot write --export"):
        objective.export(params, str(target))


def test_exports_do_not_contain_the_workdir(folder, chats, tmp_path, capsys):
    workdir = tmp_path / "runs" / "x"
    for export in (workdir, tmp_path / "runs"):
        flags = {"checkpoint": folder, "data": chats, "workdir": workdir, "export": export}
        code, error = run(capsys, *(f"--{name}={value}" for name, value in flags.items()))
        assert code == 2
        assert "must not be or contain the workdir" in error
    assert not workdir.exists()
