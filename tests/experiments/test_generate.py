"""Sampling: byte-by-byte results equal those of the parallel pass."""

import io
import os
import signal
import sys

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp
from absl import logging

import seqjax
import seqjax.pretrained
from experiments import generate, train
from experiments.base import cli
from experiments.base.build import build_model
from experiments.configs import lm
from experiments.data import pipeline
from experiments.objectives import sampling
from experiments.objectives.published import until
from tests.experiments.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the workdir of a tiny trained model."""
    folder = tmp_path_factory.mktemp("generate")
    text = folder / "text.txt"
    text.write_text("abcdefgh" * 400)
    config = lm.get_config("lru,quicktest")
    config.data.path = str(text)
    train.train(config, folder / "run")
    return str(folder / "run")


# tests/generation has the steps of every layer.
@pytest.mark.quick("mamba")
@pytest.mark.parametrize("layer", ["gated_deltanet", "hybrid", "mamba"])
def test_step_gives_the_parallel_numbers(layer):
    config = lm.get_config(f"{layer},quicktest").model
    model = build_model(config)
    params = model.init(jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    expected, final = jax.jit(model.apply)(params, tokens)
    step, state, logits = jax.jit(model.step), model.initial_state(2), []
    for t in range(tokens.shape[1]):
        out, state = step(params, tokens[:, t], state)
        logits.append(out)
    np.testing.assert_allclose(np.stack(logits, 1), expected, rtol=1e-4, atol=1e-4)
    # The state has the same size after any number of bytes.
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, final)


def make_model(layer="deltanet"):
    model = build_model(lm.get_config(f"{layer},quicktest").model)
    return model, model.init(jax.random.key(1))


def settings(num_bytes=12, **changes):
    return sampling.Settings(num_bytes, **({"temperature": 0.0, "top_p": 1.0} | changes))


def test_a_greedy_sample_is_the_most_likely_text_of_the_parallel_pass():
    model, params = make_model()
    prompt = b"def "
    text = bytes(sampling.stream(model, params, prompt, settings()))
    everything = prompt + text
    read = np.frombuffer(bytes([pipeline.DOCUMENT_START]) + everything[:-1], np.uint8)
    logits, _ = jax.jit(model.apply)(params, read[None].astype(np.int32))
    assert text == bytes(np.argmax(logits[0], -1).astype(np.uint8))[len(prompt) :]


@pytest.mark.slow
def test_a_batch_has_the_texts_of_its_prompts():
    model, params = make_model()
    prompts = [b"def ", b"x", b"a longer prompt"]
    texts = sampling.batch(model, params, prompts, settings())
    alone = [bytes(sampling.stream(model, params, prompt, settings())) for prompt in prompts]
    assert texts == alone


def test_a_text_ends_after_the_stop_string():
    model, params = make_model()
    whole = bytes(sampling.stream(model, params, b"x", settings(temperature=1.0)))
    stop = whole[3:5]
    text = bytes(sampling.stream(model, params, b"x", settings(temperature=1.0, stop=stop)))
    assert text == whole[: whole.index(stop) + 2]


@pytest.mark.slow
def test_a_conversation_keeps_what_was_said():
    """Compare the second answer with the continuation of the whole text."""
    model, params = make_model()
    conversation = sampling.Conversation(model, params, settings())
    first = bytes(conversation.answer(b"one\n"))
    second = bytes(conversation.answer(b"two\n"))
    text = b"one\n" + first + b"two\n"
    assert second == bytes(sampling.stream(model, params, text, settings()))


@pytest.mark.slow
def test_seeds_and_streams(run):
    def sample(**settings):
        return "".join(generate.generate(run, "abc", num_bytes=64, **settings))

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    first = generate.generate(run, "abc", num_bytes=10**9)
    assert next(first)


def test_utf8_arrives_whole_and_the_rest_is_replaced():
    parts = list(sampling.decode("naïve €".encode() + b"\xff!" + b"\xe2\x82"))
    assert "".join(parts) == "naïve €�!�"
    assert "€" in parts


def test_control_characters_are_escaped_on_terminals_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "\tdef é():\n\x1b[2J\r\x00\x9b\u202e"
    escaped = "\tdef é():\n\\x1b[2J\\r\\x00\\x9b\\u202e"
    assert sampling.printable(text, Terminal()) == escaped
    assert sampling.printable(text, io.StringIO()) == text


def test_a_terminal_gets_no_control_characters(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(generate, "generate", lambda *args, **options: iter(["a\x1b[31m"]))
    arguments = ["generate", f"--workdir={run}", "--prompt=\x07\udcff"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 0
    assert capsys.readouterr().out == "\\x07\ufffda\\x1b[31m\n"


def test_generating_from_python_logs_no_warnings(run, caplog):
    logger = logging.get_absl_logger()
    caplog.set_level("WARNING", logger="absl")
    assert "".join(generate.generate(run, "abc", num_bytes=2))
    assert not caplog.records
    logger.warning("others are")
    assert [record.message for record in caplog.records] == ["others are"]


def test_the_command_prints_the_prompt_and_goes_on(run, capsys):
    arguments = ["generate", f"--workdir={run}", "--prompt=abc", "--num_bytes=8", "--seed=3"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("abc")
    assert printed == "abc" + "".join(generate.generate(run, "abc", num_bytes=8, seed=3)) + "\n"


@pytest.mark.slow
def test_many_prompts_and_samples(run, tmp_path, capsys):
    (tmp_path / "prompts").write_text("abc\n\nb\n")
    arguments = ["generate", f"--workdir={run}", f"--prompts={tmp_path / 'prompts'}"]
    arguments += ["--num_bytes=8", "--num_samples=2"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 0
    texts = capsys.readouterr().out.split("\n" + "-" * 40 + "\n")[:-1]
    assert [text[:1] for text in texts] == ["a", "a", "b", "b"]


def test_interactive(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\nde\n"))
    arguments = ["generate", f"--workdir={run}", "--interactive", "--num_bytes=4", "--stop=\\n"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.fixture
def published(tmp_path):
    """Return the folder of a tiny published checkpoint with a tokenizer of words."""
    return write_checkpoint(tmp_path)


def test_a_published_checkpoint_continues_a_prompt(published, capsys):
    """Compare with `seqjax.generate` on the tokens of the prompt."""
    arguments = ["generate", f"--checkpoint={published}", "--prompt=w3 w1 w4", "--num_bytes=5"]
    assert cli.run(generate.define_flags, generate.main, [*arguments, "--temperature=0"]) == 0
    model, params = seqjax.pretrained.load(published)
    out = seqjax.generate(model, params, jnp.array([[3, 1, 4]]), max_new_tokens=5, temperature=0)
    words = " ".join(f"w{token}" for token in out.tokens[0].tolist())
    assert capsys.readouterr().out == f"w3 w1 w4{words}\n"


def test_a_published_checkpoint_converses(published, capsys, monkeypatch):
    """Compare the second answer with the continuation of the whole text."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w1\nw4\n"))
    arguments = ["generate", f"--checkpoint={published}", "--interactive", "--num_bytes=3"]
    assert cli.run(generate.define_flags, generate.main, [*arguments, "--temperature=0"]) == 0
    model, params = seqjax.pretrained.load(published)
    text, answers = [], []
    for line in ([3, 1], [4]):
        text += line
        out = seqjax.generate(model, params, jnp.array([text]), max_new_tokens=3, temperature=0)
        text += out.tokens[0].tolist()
        answers.append(" ".join(f"w{token}" for token in out.tokens[0].tolist()))
    assert 31 not in text
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_a_checkpoint_without_tokenizer_ends_with_one_line(published, capsys):
    (published / "tokenizer.json").unlink()
    arguments = ["generate", f"--checkpoint={published}", "--prompt=w3"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 2
    error = capsys.readouterr().err
    assert "must have a file tokenizer.json" in error
    assert error.count("\n") == 1


def test_a_text_of_pieces_ends_after_the_stop_string():
    pieces = ["ab", "c", "de", "f"]
    assert "".join(until("cd", pieces)) == "abcd"
    assert "".join(until("", pieces)) == "abcdef"
    assert "".join(until("x", pieces)) == "abcdef"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_samples=0", "--num_samples=0: must be at least 1"),
        ("--top_k=-1", "--top_k=-1: must be 0 or more"),
        ("--prompts=nowhere.txt", "nowhere.txt"),
        ("--interactive --prompt=a", "give one of them"),
        ("--stop=\\x4", "--stop"),
        ("--temperature=-1", "--temperature=-1.0: must be 0 or more"),
        ("--top_p=0", "--top_p=0.0: must be above 0"),
        ("--num_bytes=0", "--num_bytes=0: must be at least 1"),
        ("--checkpoint=elsewhere", "--checkpoint: must not be combined with --workdir"),
        ("--which=newest", "newest"),
    ],
)
def test_bad_flags_end_with_one_line(run, capsys, flag, message):
    arguments = ["generate", f"--workdir={run}", *flag.split()]
    assert cli.run(generate.define_flags, generate.main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_command_that_fails_prints_no_text(capsys, tmp_path):
    arguments = ["generate", f"--workdir={tmp_path}", "--prompt=a"]
    assert cli.run(generate.define_flags, generate.main, arguments) == 2
    assert not capsys.readouterr().out


def test_a_closed_pipe_ends_quietly(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(generate, "generate", lambda *args, **options: iter(["text"]))
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        arguments = ["generate", "--workdir=anywhere", "--prompt=a"]
        assert cli.run(generate.define_flags, generate.main, arguments) == 128 + signal.SIGPIPE
    assert not capsys.readouterr().err
