"""Fine-tuning of a published checkpoint: data, training, exact resume, export and errors."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

from experiments import finetune, generate
from experiments.base import cli, logs
from experiments.base.errors import UserError
from experiments.configs import finetune as configs
from experiments.data import chat, finetuning, pipeline, tokens
from experiments.training import checkpoints
from seqjax import pretrained
from tests.experiments.checkpoint import TEMPLATE, write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TEMPLATE)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a file of words that repeat, which a model can learn."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{i % 7 + 5}" for i in range(3000)))
    return file


def quick(folder, data, rank=2, **fields):
    config = configs.get_config()
    config.model.update(checkpoint=str(folder), lora_rank=rank)
    config.data.update(path=str(data), length=16, batch_size=4, shuffle_windows=8)
    config.update(steps=6, log_every=2, eval_every=3, save_every=3)
    config.optimizer.update(learning_rate=2e-2, warmup_steps=1)
    config.eval.update(windows=2, final_windows=4)
    config.update(fields)
    return config


def losses(workdir):
    rows = logs.read_rows(workdir)
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module", params=[0, 2], ids=["all", "lora"])
def reference(request, folder, text, tmp_path_factory):
    """Return the rank, the workdir and the export of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run")
    config = quick(folder, text, request.param)
    export = workdir / "export"
    finetune.finetune(config, workdir, str(export))
    return request.param, workdir, export


@pytest.mark.quick("lora")
def test_the_loss_falls_and_all_files_are_there(reference):
    _, workdir, export = reference
    rows = losses(workdir)
    steps = [row["loss"] for row in rows if "loss" in row]
    assert len(steps) == 6
    assert steps[-1] < 0.8 * steps[0]
    held = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert held[-1] < held[0]
    assert (workdir / "curves.png").exists()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["heldout_tokens"] == 64
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


@pytest.mark.quick("lora")
def test_the_export_is_the_trained_model(reference, folder, text):
    """Compare logits of the export with those of the checkpoint in the workdir."""
    rank, workdir, export = reference
    objective = finetune_objective(folder, text, rank)
    loaded = objective.load(finetune.devices.DeviceMesh(""))
    first = loaded if loaded is not None else objective.trained.init(jax.random.key(0))
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saver:
        abstract = jax.tree.map(checkpoints.ocp.utils.to_shape_dtype_struct, first)
        restore = checkpoints.ocp.args.StandardRestore(abstract)
        params = checkpoints._restore(saver._latest, saver.latest_step(), params=restore)["params"]
    merged = objective.merge(params, objective.frozen)
    batch = jnp.arange(20)[None] % 32
    expected, _ = jax.jit(objective.model.apply)(merged, batch)
    model, exported = pretrained.load(export)
    got, _ = jax.jit(model.apply)(exported, batch)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    _, original = pretrained.load(folder)
    before, _ = jax.jit(model.apply)(original, batch)
    assert np.abs(got - before).max() > 0.1
    if rank:  # adapters change projections only
        mixer = exported["backbone"]["block_0"]["mixer"]
        start = original["backbone"]["block_0"]["mixer"]
        assert (mixer["A_log"] == start["A_log"]).all()
        assert (exported["embedding"] == original["embedding"]).all()
        assert (mixer["in_proj"] != start["in_proj"]).any()


def finetune_objective(folder, text, rank, **fields):
    from experiments.objectives import protocol

    return protocol.make(quick(folder, text, rank, **fields))


@pytest.mark.slow
def test_transformers_reads_the_export(reference):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, _, export = reference
    model, params = pretrained.load(export)
    batch = np.arange(20)[None] % 32
    expected, _ = model.apply(params, jnp.asarray(batch))
    other = transformers.AutoModelForCausalLM.from_pretrained(export).eval()
    with torch.no_grad():
        got = other(torch.tensor(batch)).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_stop_and_resume_is_a_run_never_stopped(reference, folder, text, tmp_path, monkeypatch):
    rank, workdir, export = reference
    take, count = pipeline.Streams.__next__, iter(range(1, 100))

    def stopping(self):
        if next(count) == 4:
            signal.raise_signal(signal.SIGTERM)
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Streams, "__next__", stopping)
        config = quick(folder, text, rank)
        stopped = finetune.finetune(config, tmp_path, str(tmp_path / "export"))
    assert stopped == {"exit_code": 128 + signal.SIGTERM, "step": 4}
    assert not (tmp_path / "export").exists()
    finetune.finetune(quick(folder, text, rank), tmp_path, str(tmp_path / "export"))
    assert losses(tmp_path) == losses(workdir)
    whole, again = (
        (path / "model.safetensors").read_bytes() for path in (export, tmp_path / "export")
    )
    assert whole == again


@pytest.mark.slow
def test_the_loss_on_a_mesh_is_that_of_one_device(reference, folder, text, tmp_path):
    rank, workdir, _ = reference
    config = quick(folder, text, rank, mesh="data=1,fsdp=2,tensor=2,sequence=2")
    finetune.finetune(config, tmp_path, str(tmp_path / "export"))
    for row, expected in zip(losses(tmp_path), losses(workdir), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_stacked_blocks_and_bfloat16_train(folder, text, tmp_path):
    """Check that adapters of a narrow model are float32, and that the export is narrow."""
    config = quick(folder, text, steps=2)
    config.model.update(scan=True, dtype="bfloat16")
    finetune.finetune(config, tmp_path, str(tmp_path / "export"))
    model, _ = pretrained.load(tmp_path / "export")
    assert model.dtype == "bfloat16"


def test_a_finetuned_workdir_points_to_its_export(reference, capsys):
    arguments = ["generate", f"--workdir={reference[1]}"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 2
    assert "run it with --export=FOLDER, then use --checkpoint" in capsys.readouterr().err


# Chats


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def chat_of(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": words(c)} for i, c in enumerate(contents)]


def test_only_the_turns_of_the_assistant_count(folder):
    tokenizer = tokens.Tokenizer(folder)
    (document,) = tokenizer.chat(chat_of([10, 11], [12, 13], [14], [15]))
    read = [1, 2, 10, 11, 4, 1, 3, 12, 13, 4, 1, 2, 14, 4, 1, 3, 15, 4]
    assert document["inputs"].tolist() == read[:-1]
    assert document["targets"].tolist() == read[1:]
    assert document["targets"][document["counted"]].tolist() == [12, 13, 4, 15, 4]


def test_a_template_that_rewrites_earlier_turns_gives_one_text_a_turn(tmp_path):
    """Check a template that keeps the text after w9 of earlier turns only, like a reasoning."""
    keep_last = "(message.content if loop.last else message.content.split('w9 ')[-1])"
    template = TEMPLATE.replace("message.content", keep_last, 1)
    tokenizer = tokens.Tokenizer(write_checkpoint(tmp_path, template))
    first, second = tokenizer.chat(chat_of([10], [8, 9, 12], [14], [8, 9, 15]))
    assert first["targets"][first["counted"]].tolist() == [8, 9, 12, 4]
    assert second["targets"][second["counted"]].tolist() == [8, 9, 15, 4]
    assert second["inputs"].tolist() == [1, 2, 10, 4, 1, 3, 12, 4, 1, 2, 14, 4, 1, 3, 8, 9, 15]


def test_templates_use_the_functions_of_the_reference(tmp_path):
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
        "{% if messages and messages[0].role == 'user' %}"
        "{{ raise_exception('no user') }}{% endif %}"
    )
    made = chat.Template(write_checkpoint(tmp_path, template))
    answer = [{"role": "assistant", "content": "w5 "}]
    assert list(made.render(answer)) == [("w5 w31", [(0, 6)])]
    with pytest.raises(ValueError, match="the chat template refuses the messages: no user"):
        list(made.render([{"role": "user", "content": "w5"}, *answer]))
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="the chat template must be valid"):
        chat.Template(tmp_path)


@pytest.mark.slow
def test_chats_and_texts_train_together(folder, tmp_path):
    lines = [{"messages": chat_of([10, 11], [12, 13] * 4)}, {"text": words([5, 6] * 20)}] * 6
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    corpus = finetuning.load(str(file), tokens.Tokenizer(folder), 0.2)
    assert len(corpus.train) + len(corpus.heldout) == len(lines)
    assert all(
        doc["targets"][-1] == (31 if len(doc["targets"]) > 20 else 4) for doc in corpus.train
    )
    finetune.finetune(quick(folder, file, steps=2), tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_the_windows_of_a_batch_are_the_documents(folder, text):
    """Check packing: targets follow inputs, and the padding of the last window does not count."""
    first, second = np.arange(5), np.arange(10, 17)
    documents = [{"inputs": x[:-1], "targets": x[1:]} for x in (first, second)]
    packed = pipeline.windows(documents, 4)
    assert packed["inputs"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [14, 15, 0, 0]]
    assert packed["segment_ids"].tolist() == [[1] * 4, [2] * 4, [2, 2, 0, 0]]
    batch = next(finetune_objective(folder, text, 2).batches(range(4)))
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1])[same].all()
    assert batch["inputs"].dtype == np.int32
    assert batch["counted"].all()


# Errors


def run(capsys, *arguments):
    code = cli.run(finetune.define_flags, finetune.main, ["finetune", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 300
    return code, error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"checkpoint": ""}, "no --checkpoint"),
        ({"data": ""}, "no --data"),
        ({"data": "nowhere.txt"}, "cannot read --data=nowhere.txt: No such file"),
        ({"checkpoint": "nowhere"}, "--checkpoint=nowhere: load: `path` must be a folder"),
        ({"lora_rank": "-1"}, "--lora_rank=-1: must be 0 or more"),
        ({"export": "CHECKPOINT"}, "must be a new or empty folder"),
        ({"config.data.length": "9999"}, "is too small"),
        ({"config": "experiments/configs/lm.py"}, "must be a configuration of fine-tuning"),
        ({"config.model.rank": "1"}, "unknown config field"),
    ],
)
def test_bad_flags_end_with_one_line(folder, text, capsys, flags, message, monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("weights are read")

    monkeypatch.setattr(pretrained, "load", refuse)
    given = {"checkpoint": str(folder), "data": str(text)} | flags
    given = {name: str(folder) if value == "CHECKPOINT" else value for name, value in given.items()}
    code, error = run(capsys, *(f"--{name}={value}" for name, value in given.items()))
    assert code == 2
    assert message in error


MESSAGES = '{"messages": [{"role": "user", "content": "w5"}]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.txt", b"w1 \xff", "must be UTF-8 text, got another byte at position 3"),
        ("a.jsonl", '{"text": "w5"}\n{"text": ', "line 2: must be valid JSON"),
        ("a.jsonl", '{"text": "w5"}\n\n[1]', "line 3: must be an object with `text` or `messages`"),
        ("a.jsonl", '{"text": 1}\n', "line 1: `text` must be a string"),
        ("a.jsonl", '{"messages": []}\n', "line 1: `messages` must be a list that is not empty"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1: every message must have"),
        ("a.jsonl", MESSAGES, "must have at least 2 lines"),
        (
            "a.jsonl",
            f"{MESSAGES}\n{MESSAGES}",
            "line 1: `messages` must have a message of the role",
        ),
    ],
)
def test_bad_data_ends_with_the_line(folder, tmp_path, capsys, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, error = run(capsys, f"--checkpoint={folder}", f"--data={file}")
    assert code == 2
    assert message in error


def test_a_missing_tokenizer_or_template_is_one_line(folder, text, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer_config.json").unlink()
    file = tmp_path / "a.jsonl"
    file.write_text(f"{MESSAGES}\n{MESSAGES}")
    _, error = run(capsys, f"--checkpoint={copy}", f"--data={file}")
    assert "line 1: `messages` must have a tokenizer with a chat template" in error
    (copy / "tokenizer.json").unlink()
    _, error = run(capsys, f"--checkpoint={copy}", f"--data={text}")
    assert "must have a file tokenizer.json" in error


@pytest.mark.slow
def test_other_data_is_refused_on_resume(reference, folder, text, tmp_path):
    rank, workdir, _ = reference
    other = tmp_path / text.name
    other.write_text(text.read_text() + " w3")
    config = quick(folder, other, rank)
    with pytest.raises(UserError, match="was made with other settings"):
        finetune.finetune(config, workdir)
