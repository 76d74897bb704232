"""`generate`, `stream` and `prefill`: equal to repeated steps, on every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import seqjax
from seqjax import sharding
from seqjax.generation.sampling import Sampling, choose, filtered
from seqjax.layers import REGISTRY
from tests.contract.harness import assert_close
from tests.generation.models import greedy_loop, hybrid, leaves, of_layer, prompts

pytestmark = pytest.mark.usefixtures("compiled_quickly")
QUICK = {"lru", "attention"}
LENGTHS = np.array([21, 5, 13])
FILTERS = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in sorted(REGISTRY)],
)
def test_every_layer_generates_what_its_steps_give(name):
    """Compare with a loop over rows, with other rows in the batch, and with other chunks."""
    model, params = of_layer(name)
    prompt = prompts()
    options = {"max_new_tokens": 6, "temperature": 0}
    out = seqjax.generate(model, params, prompt, lengths=LENGTHS, **options)
    alone = seqjax.generate(model, params, prompt[1:2, :5], chunk_size=2, **options)
    assert_close(alone.logprobs[0], out.logprobs[1], 1e-4)
    assert alone.tokens[0].tolist() == out.tokens[1].tolist()
    for row, length in enumerate(LENGTHS):
        tokens, state = greedy_loop(model, params, prompt[row, :length], 6)
        assert out.tokens[row].tolist() == tokens
        if row == 1:
            got = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], out.state)
            assert_close(leaves(got), leaves(state), 1e-4)


def test_prefill_in_any_chunks_is_apply():
    model, params = hybrid()
    prompt = prompts()
    logits, state = jax.jit(model.apply)(params, prompt)
    for chunk_size in (1, 8, 21, 100):
        got = seqjax.prefill(model, params, prompt, chunk_size=chunk_size)
        assert_close(got[0], logits[:, -1], 1e-4)
        assert jax.tree.map(jnp.shape, got[1]) == jax.tree.map(jnp.shape, state)
    first = seqjax.prefill(model, params, prompt[:, :9])[1]
    assert_close(seqjax.prefill(model, params, prompt[:, 9:], first)[0], logits[:, -1], 1e-4)


@pytest.mark.slow
def test_rows_end_at_their_stop_tokens():
    model, params = hybrid()
    prompt = prompts()
    rows = [greedy_loop(model, params, prompt[row], 9)[0] for row in range(3)]
    stop = rows[0][3]
    out = seqjax.generate(
        model, params, prompt, max_new_tokens=9, temperature=0, stop_tokens=[stop]
    )
    for row, tokens in enumerate(rows):
        length = tokens.index(stop) + 1 if stop in tokens else 9
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == tokens[:length] + [0] * (9 - length)
        assert (out.logprobs[row, length:] == 0).all()
        _, state = greedy_loop(model, params, prompt[row], 9, [stop])
        got = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], out.state)
        assert_close(leaves(got), leaves(state), 1e-4)


@pytest.mark.slow
def test_a_state_continues_a_text():
    """Check that two calls generate what one does, from the last token of the first."""
    model, params = hybrid()
    prompt = prompts()
    whole = seqjax.generate(model, params, prompt, max_new_tokens=8, temperature=0)
    first = seqjax.generate(model, params, prompt, max_new_tokens=3, temperature=0)
    rest = seqjax.generate(
        model,
        params,
        first.tokens[:, -1:],
        state=first.state,
        max_new_tokens=5,
        temperature=0,
    )
    assert jnp.array_equal(jnp.concatenate([first.tokens, rest.tokens], 1), whole.tokens)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    model, params = hybrid()
    prompt, keys = prompts(), jax.random.split(jax.random.key(1), 3)
    options = {"max_new_tokens": 7, **FILTERS}
    out = seqjax.generate(model, params, prompt, key=keys, lengths=LENGTHS, **options)
    alone = seqjax.generate(model, params, prompt[1:2, :5], key=keys[1:2], **options)
    assert alone.tokens[0].tolist() == out.tokens[1].tolist()
    other = seqjax.generate(
        model, params, prompt, key=jax.random.key(2), lengths=LENGTHS, **options
    )
    assert not jnp.array_equal(other.tokens, out.tokens)


@pytest.mark.quick("100")
@pytest.mark.parametrize("group_size", [3, 100])
def test_a_stream_is_the_generation(group_size):
    model, params = hybrid()
    options = {"max_new_tokens": 8, "key": jax.random.key(3), "stop_tokens": [4], **FILTERS}
    whole = seqjax.generate(model, params, prompts(), **options)
    groups = list(seqjax.stream(model, params, prompts(), group_size=group_size, **options))
    tokens = np.concatenate([group.tokens for group in groups], 1)
    longest = int(whole.lengths.max())
    np.testing.assert_array_equal(tokens[:, :longest], whole.tokens[:, :longest])
    np.testing.assert_array_equal(sum(group.lengths for group in groups), whole.lengths)
    assert longest == 8  # so that both end at the same token
    assert_close(leaves(groups[-1].state), leaves(whole.state), 1e-5)


def test_values_do_not_compile_again():
    model, params = hybrid()
    compilations = []

    def listen(event, *args, **keywords):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    def run(temperature, seed, stop):
        return seqjax.generate(
            model,
            params,
            prompts(seed=seed),
            max_new_tokens=3,
            key=jax.random.key(seed),
            temperature=temperature,
            top_p=0.9,
            stop_tokens=[stop],
        )

    run(0.5, 0, 1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(0.9, 1, 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, id="Auto", marks=pytest.mark.slow), AxisType.Explicit],
    ids=lambda kind: kind.name,
)
def test_on_a_mesh(kind):
    model, params = hybrid()
    prompt, lengths = prompts(batch=4), np.array([21, 5, 13, 8])
    options = {"max_new_tokens": 4, "temperature": 0}
    expected = seqjax.generate(model, params, prompt, lengths=lengths, **options)
    mesh = sharding.make_mesh("data=2,fsdp=2", jax.devices()[:4], axis_types=kind)
    shardings = sharding.shard(model, mesh, batch_shape=(4, 21))
    split = NamedSharding(mesh, P(("data", "fsdp")))
    placed = jax.device_put((prompt, lengths), split)
    pieces = jax.device_put(params, shardings.params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(pieces))
    with jax.set_mesh(mesh):
        out = seqjax.generate(model, pieces, placed[0], lengths=placed[1], **options)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.tokens.sharding.spec[0] == ("data", "fsdp")


def test_filters_keep_the_likely_tokens():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]))

    def allowed(**options):
        return jnp.isfinite(filtered(logits, Sampling(**options).check("t", 2))).tolist()[0]

    assert allowed(top_k=2) == [True, True, False, False]
    assert allowed(top_p=0.65) == [True, True, False, False]
    assert allowed(top_p=1e-9) == [True, False, False, False]
    assert allowed(min_p=0.6) == [True, True, False, False]
    assert allowed(top_k=3, min_p=0.3) == [True, True, True, False]
    rows = jnp.isfinite(filtered(logits, Sampling(top_k=jnp.array([1, 4])).check("t", 2)))
    assert rows.sum(1).tolist() == [1, 4]


def test_the_repetition_penalty_lowers_what_occurred():
    logits = jnp.array([[1.0, -1.0, 0.5]])
    seen = jnp.array([[True, True, False]])
    sampling = Sampling(temperature=0, repetition_penalty=4.0).check("t", 1)
    token, logprob = choose(None, logits, seen, sampling)
    assert token.tolist() == [2]
    assert_close(logprob, jax.nn.log_softmax(logits)[:, 2], 1e-6)


def test_draws_have_the_probabilities_of_the_model():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    sampling = Sampling(temperature=2.0, top_k=2).check("t", 4000)
    tokens, _ = choose(keys, jnp.tile(logits, (4000, 1)), None, sampling)
    likely = np.sqrt([0.5, 0.3]) / np.sqrt([0.5, 0.3]).sum()
    shares = np.bincount(tokens, minlength=3) / 4000
    np.testing.assert_allclose(shares, [*likely, 0], atol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, r"generate: `max_new_tokens` must be an integer >= 1, got 0\."),
        ({"key": None}, r"generate: `key` must be a jax\.random key, got None; .*temperature=0"),
        ({"key": 3}, r"generate: `key` must be a jax\.random key, got 3"),
        ({"temperature": -1.0}, r"generate: `temperature` must be 0 or more, got -1\.0\."),
        ({"top_p": 0.0}, r"generate: `top_p` must be above 0 and at most 1, got 0\.0\."),
        ({"top_k": 0}, r"generate: `top_k` must be an integer >= 1, got 0\."),
        ({"min_p": 2.0}, r"generate: `min_p` must be from 0 to 1, got 2\.0\."),
        ({"top_k": np.ones(5, int)}, r"generate: `top_k` must be a number or have shape \[3\]"),
        ({"stop_tokens": [99]}, r"generate: `stop_tokens` must be from 0 to vocab_size - 1 = 10"),
        ({"lengths": np.array([1, 2, 30])}, r"generate: `lengths` must be from 1 to 21, got"),
        ({"lengths": np.ones(2, int)}, r"generate: `lengths` must be integers of shape \[3\]"),
        ({"chunk_size": 0}, r"generate: `chunk_size` must be an integer >= 1, got 0\."),
        ({"prompt": np.zeros((3, 0), int)}, r"generate: the prompt must be integers of shape"),
        ({"prompt": np.full((3, 2), 11)}, r"LanguageModel: `tokens` must be from 0 to"),
    ],
)
def test_bad_arguments(change, message):
    model, params = hybrid()
    options = {"prompt": prompts(), "max_new_tokens": 2, "key": jax.random.key(0)} | change
    with pytest.raises(ValueError, match="^" + message):
        seqjax.generate(model, params, options.pop("prompt"), **options)


def test_swapped_arguments_are_named():
    model, params = hybrid()
    with pytest.raises(ValueError, match=r"^generate: `model` must be a causal .*, got dict; the"):
        seqjax.generate(params, model, prompts(), max_new_tokens=2, temperature=0)


@pytest.mark.slow
def test_padding_may_hold_any_number():
    model, params = hybrid()
    prompt = prompts()
    padded = np.where(np.arange(21) < LENGTHS[:, None], prompt, -1)
    options = {"max_new_tokens": 3, "temperature": 0, "lengths": LENGTHS}
    got, expected = (seqjax.generate(model, params, p, **options) for p in (padded, prompt))
    assert jnp.array_equal(got.tokens, expected.tokens)
