"""Beam search, speculative decoding, cached prefixes and snapshots."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.models import Backbone, LanguageModel
from tests.contract.harness import assert_close
from tests.generation.models import hybrid, leaves, prompts, small, with_params

pytestmark = pytest.mark.usefixtures("compiled_quickly")
LENGTHS = np.array([21, 5, 13])


def test_wide_beams_find_the_best_of_all_continuations():
    model, params = with_params(LanguageModel(4, Backbone(seqjax.layers.LRU(4), mlp_ratio=0)))
    prompt = prompts(batch=1, length=5) % 4
    every = np.array(list(itertools.product(range(4), repeat=3)), np.int32)
    text = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    logits = jax.nn.log_softmax(jax.jit(model.apply)(params, text)[0])[:, 4:-1]
    scores = np.take_along_axis(np.asarray(logits), every[..., None], 2).sum((1, 2))
    beams = seqjax.beam_search(
        model, params, prompt, max_new_tokens=3, num_beams=4, length_penalty=0.0
    )
    assert beams.tokens[0, 0].tolist() == every[scores.argmax()].tolist()
    assert_close(beams.scores[0, 0], np.float32(scores.max()), 1e-4)
    for tokens, score in zip(beams.tokens[0], beams.scores[0], strict=True):
        [index] = np.flatnonzero((every == np.asarray(tokens)).all(1))
        assert_close(score, np.float32(scores[index]), 1e-4)
    assert (jnp.diff(beams.scores[0]) <= 0).all()


@pytest.mark.slow
def test_one_beam_is_greedy():
    model, params = hybrid()
    options = {"max_new_tokens": 6, "lengths": LENGTHS, "stop_tokens": [3]}
    beams = seqjax.beam_search(model, params, prompts(), num_beams=1, length_penalty=0.0, **options)
    out = seqjax.generate(model, params, prompts(), temperature=0, **options)
    assert jnp.array_equal(beams.tokens[:, 0], out.tokens)
    assert jnp.array_equal(beams.lengths[:, 0], out.lengths)
    assert_close(beams.scores[:, 0], out.logprobs.sum(1), 1e-4)
    assert_close(leaves(jax.tree.map(lambda x: x[:, 0], beams.state)), leaves(out.state), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [
        pytest.param(True, id="target as draft", marks=pytest.mark.slow),
        pytest.param(False, id="small draft"),
    ],
)
def test_greedy_speculation_is_greedy_decoding(own):
    model, params = hybrid()
    draft, draft_params = hybrid() if own else small()
    options = {"max_new_tokens": 9, "lengths": LENGTHS, "stop_tokens": [3], "temperature": 0}
    out = seqjax.generate(model, params, prompts(), **options)
    got = seqjax.speculate(model, draft, params, draft_params, prompts(), **options)
    assert jnp.array_equal(got.tokens, out.tokens)
    assert jnp.array_equal(got.lengths, out.lengths)
    assert_close(got.logprobs, out.logprobs, 1e-4)
    assert_close(leaves(got.state), leaves(out.state), 1e-4)
    if own:  # every proposal is accepted, five tokens a round after the first
        assert_close(leaves(got.draft_state), leaves(out.state), 1e-4)
        assert (got.rounds <= 1 + -(-(got.lengths - 1) // 5)).all()


def test_speculation_has_the_distribution_of_the_target():
    """Compare the counts of all pairs of tokens with their probabilities, by chi-squared."""
    vocab, rows = 4, 20_000
    model, params = with_params(LanguageModel(vocab, Backbone(seqjax.layers.LRU(4), mlp_ratio=0)))
    draft, draft_params = with_params(model, seed=5)
    prompt = jnp.array([[1, 2, 3]])
    got = seqjax.speculate(
        model,
        draft,
        params,
        draft_params,
        jnp.tile(prompt, (rows, 1)),
        max_new_tokens=3,
        draft_tokens=2,
        key=jax.random.key(0),
        temperature=0.7,
        top_k=3,
    )
    every = np.array(list(itertools.product(range(vocab), repeat=3)), np.int32)
    text = jnp.concatenate([jnp.tile(prompt, (len(every), 1)), every], axis=1)
    logits = np.asarray(jax.jit(model.apply)(params, text)[0])[:, 2:-1] / 0.7
    logits = np.where(logits >= np.sort(logits)[..., -3, None], logits, -np.inf)
    probability = np.exp(np.asarray(jax.nn.log_softmax(logits)))
    probability = np.take_along_axis(probability, every[..., None], 2)[..., 0].prod(1)
    codes = np.asarray(got.tokens) @ np.array([vocab**2, vocab, 1])
    counts = np.bincount(codes, minlength=vocab**3)
    assert (counts[probability == 0] == 0).all()
    expected = rows * probability[probability > 0]
    chi_squared = ((counts[probability > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    # Four standard deviations of the statistic; the counts of the draft alone are far outside.
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)
    assert 1 < got.rounds.mean() < 3


@pytest.mark.slow
def test_vocabularies_must_agree():
    model, params = hybrid()
    other, other_params = with_params(LanguageModel(12, Backbone(seqjax.layers.LRU(4))))
    with pytest.raises(ValueError, match=r"^speculate: .* must have the same vocab_size, got 11"):
        seqjax.speculate(
            model, other, params, other_params, prompts(), max_new_tokens=2, temperature=0
        )


def test_a_cached_prefix_is_not_read_again():
    model, params = hybrid()
    text = np.asarray(prompts(batch=1)[0])
    cache = seqjax.PrefixCache(max_bytes=1 << 20)
    cache.prefill(model, params, text[:8], positions=[4])
    assert len(cache) == 2
    assert cache.longest(text[:8])[0] == 4  # the whole prompt leaves nothing to read
    assert cache.longest(text)[0] == 8
    other = np.where(np.arange(21) == 6, (text + 1) % 11, text)
    assert cache.longest(other)[0] == 4
    assert cache.longest((text + 1) % 11) == (0, None)
    logits, state = cache.prefill(model, params, text)
    expected, whole = seqjax.prefill(model, params, text[None])
    assert_close(logits, expected, 1e-4)
    assert_close(leaves(state), leaves(whole), 1e-4)


def test_a_cache_forgets_states_that_another_call_took():
    model, params = small()
    cache = seqjax.PrefixCache(max_bytes=1 << 20)
    _, state = cache.prefill(model, params, np.arange(4), positions=[2])
    options = {"max_new_tokens": 2, "temperature": 0.0, "donate_state": True}
    seqjax.generate(model, params, jnp.array([[5]]), state=state, **options)
    assert cache.longest(np.arange(5))[0] == 2
    cache.prefill(model, params, np.arange(5))


def test_a_full_cache_drops_the_oldest_states():
    model, _ = hybrid()
    state = model.initial_state(1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    cache = seqjax.PrefixCache(max_bytes=2 * size)
    for token in (1, 2):
        cache.insert([token], state)
    assert cache.longest([1, 0])[0] == 1  # now the most recent
    cache.insert([3], state)
    assert [cache.longest([token, 0])[0] for token in (1, 2, 3)] == [1, 0, 1]
    assert cache.num_bytes == 2 * size
    with pytest.raises(ValueError, match=r"^PrefixCache: a state of \d+ bytes must fit"):
        seqjax.PrefixCache(max_bytes=size - 1).insert([1], state)


def test_snapshots(tmp_path):
    model, params = hybrid()
    _, state = seqjax.prefill(model, params, prompts())
    seqjax.save_state(tmp_path / "state", state)
    got = seqjax.load_state(tmp_path / "state", like=model.initial_state(3))
    jax.tree.map(np.testing.assert_array_equal, got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    with pytest.raises(ValueError, match=r"^load_state: .* must be float32 of shape \[2, "):
        seqjax.load_state(tmp_path / "state", like=model.initial_state(2))
    with pytest.raises(ValueError, match=r"^load_state: the file must have the leaves"):
        seqjax.load_state(tmp_path / "state", like=small()[0].initial_state(3))
