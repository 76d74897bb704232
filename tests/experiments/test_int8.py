"""Published checkpoints with projections in int8."""

import sys

import pytest

pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

import seqjax
from experiments import evaluate, generate
from experiments.base import cli
from experiments.objectives import int8
from tests.experiments.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny published checkpoint with a tokenizer of words."""
    return write_checkpoint(tmp_path_factory.mktemp("int8"))


def run(command, *arguments):
    return cli.run(command.define_flags, command.main, [command.__name__, *arguments])


def test_text_of_int8_weights_is_that_of_the_rounded_weights(folder, capsys):
    pytest.importorskip("qwix")
    arguments = [f"--checkpoint={folder}", "--prompt=w3 w1", "--num_bytes=6", "--temperature=0"]
    assert run(generate, *arguments, "--int8") == 0
    model, params = seqjax.pretrained.load(folder)
    small = int8.quantize(params)
    assert jnp.int8 in [leaf.dtype for leaf in jax.tree.leaves(small)]
    rounded = jax.jit(int8.dequantize)(small)
    prompt = jnp.array([[3, 1]])
    out = seqjax.generate(model, rounded, prompt, max_new_tokens=6, temperature=0)
    words = " ".join(f"w{token}" for token in out.tokens[0].tolist())
    assert capsys.readouterr().out == f"w3 w1{words}\n"


def test_perplexity_of_int8_weights(folder, tmp_path):
    pytest.importorskip("qwix")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n % 7}" for n in range(40)))
    options = evaluate.Options(window=16)
    small, whole = (
        evaluate.evaluate_checkpoint(str(folder), str(text), options, in_int8=in_int8)
        for in_int8 in (True, False)
    )
    assert small["perplexity"] == pytest.approx(whole["perplexity"], rel=0.02)
    assert small["perplexity"] != whole["perplexity"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (generate, ["--checkpoint=FOLDER", "--prompt=w3"], "--int8: qwix must be installed"),
        (generate, ["--workdir=a"], "--int8: must have --checkpoint"),
        (evaluate, ["--workdir=a"], "--int8: must have --checkpoint"),
        (
            evaluate,
            ["--checkpoint=FOLDER", "--text=T", "--dynamic_evaluation"],
            "--int8: must not be combined with --dynamic_evaluation",
        ),
    ],
)
def test_errors_are_one_line(command, arguments, message, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    assert run(command, *arguments, "--int8") == 2
    assert message in capsys.readouterr().err
