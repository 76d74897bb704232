"""Evaluation of published checkpoints, and dynamic evaluation."""

import functools
import math

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

from experiments import evaluate, train
from experiments.base import cli
from experiments.configs import lm
from experiments.data import pipeline, tokens
from experiments.objectives import dynamic, heldout, protocol, published
from seqjax import layers, models, pretrained
from tests.experiments.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def words(seed, count):
    drawn = np.random.default_rng(seed).integers(0, 31, count)
    return " ".join(f"w{i}" for i in drawn)


def test_perplexity_and_bits_are_those_of_one_long_pass(folder, tmp_path, capsys):
    """Compare windows with a carried state with `apply` on all tokens at once."""
    text = words(0, 100)
    file = tmp_path / "text.txt"
    file.write_text(text)
    arguments = ["evaluate", f"--checkpoint={folder}", f"--text={file}", "--window=7"]
    assert cli.run(evaluate.define_flags, evaluate.main, arguments) == 0
    printed = capsys.readouterr().out
    result = evaluate.evaluate_checkpoint(str(folder), str(file), evaluate.Options(window=7))
    model, params = pretrained.load(folder)
    ids = jnp.array([tokens.Tokenizer(folder).encode(text)])
    logits, _ = model.apply(params, ids[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
    nats = -float(chosen.sum())
    assert result["tokens"] == 99
    assert result["perplexity"] == pytest.approx(math.exp(nats / 99), rel=1e-5)
    size = len(text.split(" ", 1)[1]) + 1  # all bytes after the first word
    bits = nats / math.log(2) / size
    assert result["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert f"perplexity {result['perplexity']:.4f} on 99 tokens\n" in printed
    assert f"bits per byte {bits:.4f}" in printed


def test_lanes_lose_their_context_only(folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(0, 101))
    two = evaluate.evaluate_checkpoint(str(folder), str(file), evaluate.Options(lanes=2))
    assert two["tokens"] == 100
    model, params = pretrained.load(folder)
    ids = jnp.array([tokens.Tokenizer(folder).encode(file.read_text())])
    halves = jnp.concatenate([ids[:, :50], ids[:, 50:100]])
    logits, _ = model.apply(params, halves)
    targets = jnp.concatenate([ids[:, 1:51], ids[:, 51:]])[..., None]
    nats = -float(jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1).sum())
    assert two["perplexity"] == pytest.approx(math.exp(nats / 100), rel=1e-5)


def test_attention_caches_bound_the_context(tmp_path):
    """Check a hybrid: the state is cleared where its cache would be full."""
    import pathlib
    import shutil

    checkpoint = pathlib.Path(__file__).parents[1] / "models" / "checkpoints" / "granite"
    hybrid = tmp_path / "granite"
    write_checkpoint(hybrid)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / file, hybrid)
    text = words(1, 60)
    read = published.read_text(str(hybrid), text, window=8, lanes=1, dtype=None, capacity=20)
    assert read.context == 16
    assert "cleared every 16 tokens" in read.remark
    assert np.flatnonzero(read.streams["reset"][0]).tolist() == [0, 16, 32, 48]
    nats = heldout.make_total(read.model)(read.params(), read.streams, read.window)
    assert math.isfinite(nats)
    with pytest.raises(evaluate.UserError, match="--window=30: must be at most 20"):
        published.read_text(str(hybrid), text, window=30, lanes=1, dtype=None, capacity=20)


def test_dynamic_evaluation_is_the_loop_of_its_equation():
    backbone = models.Backbone(layers.LRU(8), depth=1, mlp_ratio=0)
    model = models.LanguageModel(256, backbone)
    params = model.init(jax.random.key(0))
    documents = [b"abcabcabcabcabcabc", b"xyz"]
    streams = pipeline.lanes(documents, 1, 5)
    rate, decay = 0.5, 0.1
    got = dynamic.make_total(model, rate, decay)(params, streams, 5)

    def loss(p, state, part):
        logits, state = model.apply(p, part["inputs"].astype(int), state, part["reset"])
        targets = part["targets"].astype(int)[..., None]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]
        total = -jnp.sum(chosen * part["counted"])
        return total / part["counted"].sum(), (total, state)

    current, state, expected = params, model.initial_state(1), 0.0
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for start in range(0, streams["inputs"].shape[1], 5):
        part = {name: x[:, start : start + 5] for name, x in streams.items()}
        (_, (total, state)), slopes = step(current, state, part)
        expected += float(total)
        current = jax.tree.map(
            lambda p, g, p0: p - rate * g + decay * (p0 - p), current, slopes, params
        )
    assert got == pytest.approx(expected, rel=1e-5)
    static = heldout.make_total(model)(params, streams, 5)
    assert got < static  # the text repeats, so the steps help
    again = dynamic.make_total(model, rate, decay)(params, streams, 5)
    assert again == got  # the parameters of the caller are unchanged


def test_bits_by_length_are_those_of_parts_of_the_sequences():
    model = models.LanguageModel(256, models.Backbone(layers.GRU(8), depth=1))
    params = model.init(jax.random.key(0))
    text = np.random.default_rng(0).integers(97, 100, 90).astype(np.uint8).tobytes()
    # A sequence has 20 bytes: the rest of a document and the last, incomplete group are left out.
    documents = [text[:45], text[45:], b"short"]
    sequences = [text[:20], text[20:40], text[45:65], text[65:85]]
    build = functools.partial(heldout.make_by_length, model, length=5, times=4)
    bits = build(documents, lanes=2)(params)
    assert list(bits) == ["bits_per_byte_5", "bits_per_byte_10", "bits_per_byte_20"]
    measure = heldout.make_evaluate(model, lanes=1, length=5)
    upto = {n: measure(params, [sequence[:n] for sequence in sequences]) for n in (5, 10, 20)}
    expected = [upto[5], 2 * upto[10] - upto[5], 2 * upto[20] - upto[10]]
    assert list(bits.values()) == pytest.approx(expected, rel=1e-5)
    assert build(documents, lanes=4)(params) == pytest.approx(bits, rel=1e-5)
    with pytest.raises(evaluate.UserError, match=r"must have config.eval.lanes=5 sequences of 20"):
        build(documents, lanes=5)


def test_options_against_collapse_change_longer_sequences_only(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(0, 2000))

    def summary(**options):
        config = lm.get_config("mamba2,quicktest")
        config.update({"steps": 1, "data": {"path": str(text)}, "sample": {"num_bytes": 0}})
        config.eval.update({"times": 4, "options": {"mamba2": options}})
        return train.train(config.lock(), tmp_path / str(options))

    plain, less = summary(), summary(write_factor=0.5)
    assert plain["heldout_bits_per_byte"] == less["heldout_bits_per_byte"]
    assert plain["bits_per_byte_128"] != less["bits_per_byte_128"]
    config = lm.get_config("mamba2,quicktest")
    config.eval.times = 3
    with pytest.raises(evaluate.UserError, match="must be a power of two"):
        protocol.make(config)


@pytest.mark.slow
def test_dynamic_evaluation_of_runs_and_checkpoints(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 400)
    config = lm.get_config("lru,quicktest")
    config.data.path = str(text)
    config.update(steps=2, eval_every=2, save_every=2)
    train.train(config, tmp_path / "run")
    capsys.readouterr()
    arguments = ["evaluate", f"--workdir={tmp_path / 'run'}", "--num_bytes=300"]
    for flags in ([], ["--dynamic_evaluation"]):
        assert cli.run(evaluate.define_flags, evaluate.main, [*arguments, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [float(line.split(" on ")[0].split()[-1]) for line in lines if "bits per byte" in line]
    assert len(found) == 2
    assert found[1] < found[0]

    file = tmp_path / "words.txt"
    file.write_text(" ".join(f"w{i % 5}" for i in range(400)))
    results = [
        evaluate.evaluate_checkpoint(str(folder), str(file), evaluate.Options(window=10, dynamic=d))
        for d in (False, True)
    ]
    assert results[1]["perplexity"] < 0.8 * results[0]["perplexity"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint=C", "--checkpoint: must have --text"),
        ("--checkpoint=C --text=T --workdir=a", "must not be combined with --workdir"),
        ("--text=T", "--text: must have --checkpoint"),
        ("--checkpoint=C --text=nowhere.txt", "cannot read --text=nowhere.txt"),
        ("--checkpoint=C --text=EMPTY", "is empty"),
        ("--checkpoint=nowhere --text=T", "--checkpoint=nowhere: load: `path` must be"),
        ("--checkpoint=C --text=T --lanes=500", "must have more than 500 tokens for 500 lanes"),
        ("--checkpoint=C --text=T --window=-1", "--window=-1: must be positive"),
        ("--workdir=a --dynamic_rate=0", "--dynamic_rate=0.0: must be positive"),
        ("--workdir=a --dynamic_decay=2", "--dynamic_decay=2.0: must be from 0 to 1"),
        (
            "--checkpoint=C --text=T --window=5 --dynamic_evaluation --dynamic_rate=1e30",
            "give a smaller --dynamic_rate",
        ),
    ],
)
def test_bad_flags_end_with_one_line(folder, tmp_path, capsys, flags, message):
    (tmp_path / "T").write_text(words(0, 40))
    (tmp_path / "EMPTY").write_text("")
    named = {"=C": folder, "=T": tmp_path / "T", "=EMPTY": tmp_path / "EMPTY"}
    arguments = []
    for flag in flags.split():
        name, value = flag.split("=") if "=" in flag else (flag, None)
        place = named.get(f"={value}")
        arguments.append(flag if place is None else f"{name}={place}")
    assert cli.run(evaluate.define_flags, evaluate.main, ["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_compressors_are_those_of_the_shell():
    text = b"the same bytes " * 1000
    result = heldout.compressors([text[:700], text[700:]])
    # The loss of a repetitive text becomes almost zero, that of random bytes does not.
    assert result["xz"] < 0.1
    assert result["gzip"] < 0.1
    noise = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8).tobytes()
    assert 8 <= heldout.compressors([noise])["gzip"] < 8.1
