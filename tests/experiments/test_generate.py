"""Sampling: byte-by-byte results equal those of the parallel pass."""

import io
import sys

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp
from absl import logging

from experiments import generate, train
from experiments.base import cli
from experiments.base.build import build_model
from experiments.configs import common, lm
from experiments.data import pipeline
from experiments.objectives import sampling

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


@pytest.mark.parametrize("layer", sorted(common.MIXERS))
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


def test_a_greedy_sample_is_the_most_likely_text_of_the_parallel_pass():
    config = lm.get_config("deltanet,quicktest").model
    model = build_model(config)
    params = model.init(jax.random.key(1))
    prompt = b"def "
    text = bytes(sampling.make_sampler(model)(params, prompt, 12, 0, 0.0, 1.0))
    everything = prompt + text
    read = np.frombuffer(bytes([pipeline.DOCUMENT_START]) + everything[:-1], np.uint8)
    logits, _ = jax.jit(model.apply)(params, read[None].astype(np.int32))
    assert text == bytes(np.argmax(logits[0], -1).astype(np.uint8))[len(prompt) :]


def test_seeds_and_streams(run):
    def sample(**settings):
        return "".join(generate.generate(run, "abc", num_bytes=64, **settings))

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    first = generate.generate(run, "abc", num_bytes=10**9)
    assert next(first)


def test_temperature_and_top_p():
    logits = jnp.log(jnp.array([0.05, 0.6, 0.05, 0.3]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(temperature, top_p):
        drawn = jax.vmap(sampling.choose, (0, None, None, None))(keys, logits, temperature, top_p)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    np.testing.assert_allclose(draw(1.0, 1.0), [0.05, 0.6, 0.05, 0.3], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.7), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(draw(0.0, 1.0), [0, 1, 0, 0])
    hot, cold = draw(2.0, 1.0), draw(0.5, 1.0)
    assert hot[1] < 0.5 < 0.75 < cold[1]


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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=-1", "--temperature=-1.0: must be 0 or more"),
        ("--top_p=0", "--top_p=0.0: must be above 0"),
        ("--num_bytes=0", "--num_bytes=0: must be at least 1"),
        ("--which=newest", "newest"),
    ],
)
def test_bad_flags_end_with_one_line(run, capsys, flag, message):
    arguments = ["generate", f"--workdir={run}", flag]
    assert cli.run(generate.define_flags, generate.main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
