"""Mistakes of users: each raises one line that names the argument, or means what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.generation.arguments import check
from seqjax.generation.sampling import Sampling, filtered
from tests.generation.models import VOCAB, hybrid, prompts, small

pytestmark = pytest.mark.usefixtures("compiled_quickly")
RAW = jax.random.PRNGKey(0)
LAST = VOCAB - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "text"}, r"the prompt must be integers of shape \[B, P\] .*, got str\."),
        ({"prompt": [[1, 2], [3]]}, r"the prompt .*, got list; pad the rows .* and pass `lengths`"),
        ({"prompt": np.array([1, 2])}, r"the prompt .*, got int64 of shape \[2\]; add .*prompt\["),
        ({"prompt": []}, r"the prompt .*, got float64 of shape \[0\]\."),
        ({"prompt": [[]]}, r"the prompt .*, got float64 of shape \[1, 0\]\."),
        ({"prompt": [[1.0]]}, r"the prompt .*, got float64 of shape \[1, 1\]\."),
        ({"prompt": [[True]]}, r"the prompt .*, got bool of shape \[1, 1\]\."),
        ({"prompt": np.array([[2**32 + 1]])}, r"the prompt .*, got int64 of shape \[1, 1\]\."),
        ({"prompt": {"a": 1}}, r"the prompt .*, got dict\."),
        ({"lengths": [0, 1, 2]}, r"`lengths` must be from 1 to 21, got \[0, 1, 2\]\."),
        ({"lengths": 3}, r"`lengths` must be integers of shape \[3\], got 3\."),
        (
            {"lengths": [1.0, 2.0, 3.0]},
            r"`lengths` must be integers of shape \[3\], got float64 of",
        ),
        ({"temperature": None}, r"`temperature` must be 0 or more, got None\."),
        ({"temperature": "hot"}, r"`temperature` must be 0 or more, got 'hot'\."),
        ({"temperature": np.nan}, r"`temperature` must be 0 or more, got nan\."),
        ({"temperature": True}, r"`temperature` must be 0 or more, got True\."),
        ({"temperature": [1.0, -2.0, 1.0]}, r"`temperature` must be 0 or more, got -2\.0\."),
        ({"temperature": [1.0, 1.0]}, r"`temperature` must be a number or have shape \[3\], got"),
        ({"temperature": np.zeros(3), "key": None}, r"`key` must be a jax\.random key, got None"),
        ({"top_k": 2.5}, r"`top_k` must be an integer >= 1, got 2\.5\."),
        ({"top_k": -1}, r"`top_k` must be an integer >= 1, got -1\."),
        ({"top_p": 1.5}, r"`top_p` must be above 0 and at most 1, got 1\.5\."),
        ({"repetition_penalty": 0}, r"`repetition_penalty` must be above 0, got 0\."),
        (
            {"stop_tokens": [1.5]},
            r"`stop_tokens` must be a token or a list of tokens, got \[1\.5\]",
        ),
        ({"stop_tokens": "\n"}, r"`stop_tokens` must be a token or a list of tokens, got '\\n'\."),
        ({"stop_tokens": None}, r"`stop_tokens` must be a token or a list of tokens, got None\."),
        ({"stop_tokens": -1}, r"`stop_tokens` must be from 0 to vocab_size - 1 = 10, got -1\."),
        ({"key": RAW}, r"`key` must be a jax\.random key, got uint32 of shape \[2\]; make one"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, r"`key` must be one key or have shape"),
    ],
)
def test_values_are_checked(change, message):
    model, _ = hybrid()
    options = {"key": jax.random.key(0), "stop_tokens": (), "lengths": None} | change
    sampling = {name: options.pop(name) for name in Sampling._fields if name in options}
    prompt = options.pop("prompt", prompts())
    with pytest.raises(ValueError, match="^generate: " + message) as raised:
        check("generate", model, prompt, sampling=Sampling(**sampling), **options)
    assert "\n" not in str(raised.value)


def test_integers_of_64_bits_do_not_wrap_around(x64):
    model, _ = hybrid()
    options = {"key": jax.random.key(0), "sampling": Sampling(), "lengths": None}
    with pytest.raises(ValueError, match=r"the prompt .*, got int64 of shape \[1, 1\]\."):
        check("generate", model, jnp.array([[2**32 + 1]]), stop_tokens=(), **options)
    with pytest.raises(ValueError, match="`stop_tokens` must be a token or a list of tokens"):
        check("generate", model, prompts(), stop_tokens=jnp.array([2**32 + 1]), **options)
    found = check("generate", model, jnp.array([[1]]), stop_tokens=jnp.array(2), **options)
    assert found.tokens.dtype == found.stop_tokens.dtype == jnp.int32


@pytest.mark.parametrize("none", [(), [], np.array([]), np.zeros(0, int), jnp.zeros(0)])
def test_no_stop_tokens(none):
    model, _ = hybrid()
    options = {"key": jax.random.key(0), "sampling": Sampling(), "lengths": None}
    stops = check("generate", model, prompts(), stop_tokens=none, **options).stop_tokens
    assert (stops.shape, stops.dtype) == ((0,), jnp.int32)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, None, "4"])
@pytest.mark.parametrize(
    ("run", "field"),
    [
        (seqjax.generate, "max_new_tokens"),
        (seqjax.generate, "chunk_size"),
        (seqjax.stream, "group_size"),
        (seqjax.beam_search, "num_beams"),
        (seqjax.speculate, "draft_tokens"),
    ],
)
def test_sizes_are_integers(run, field, value):
    model, params = small()
    models = (model, model, params, params) if run is seqjax.speculate else (model, params)
    options = {"max_new_tokens": 2, field: value}
    name = f"{run.__name__}: `{field}` must be an integer >= 1, got {value!r}."
    with pytest.raises(ValueError, match="^" + name.replace(".", r"\.")):
        run(*models, prompts(), **options)


def test_other_spellings_of_the_same():
    """NumPy's integers, lists, one stop token, and more tokens in `top_k` than there are."""
    model, params = small()
    options = {"max_new_tokens": 3, "temperature": 0}
    out = seqjax.generate(model, params, prompts(), stop_tokens=[LAST], **options)
    other = seqjax.generate(
        model,
        params,
        prompts().tolist(),
        stop_tokens=LAST,
        max_new_tokens=np.int64(3),
        temperature=np.float32(0),
    )
    assert jnp.array_equal(other.tokens, out.tokens)
    logits = jnp.arange(4.0)[None]
    for k in (4, 5, 2**40):
        allowed = filtered(logits, Sampling(top_k=k).check("t", 1))
        assert jnp.array_equal(allowed, logits)


def test_a_state_of_another_batch_is_named():
    model, params = small()
    _, state = seqjax.prefill(model, params, prompts(batch=2))
    options = {"max_new_tokens": 2, "temperature": 0}
    with pytest.raises(ValueError, match=r"`state.*must be .* of shape \[3, .*got .* \[2, "):
        seqjax.generate(model, params, prompts(), state=state, **options)
    with pytest.raises(ValueError, match=r"^LanguageModel: `state.*` must be .*, got"):
        seqjax.generate(model, params, prompts(), state={"other": 1}, **options)


def test_a_classifier_is_refused():
    model = seqjax.models.Classifier(3, seqjax.models.Backbone(seqjax.layers.LRU(4)), input_dim=4)
    with pytest.raises(ValueError, match=r"^generate: `model` must be a language model"):
        seqjax.generate(model, {}, prompts(), max_new_tokens=1, temperature=0)


def test_swapped_models_are_named():
    model, params = small()
    order = r"the order of arguments is \(target, draft, target_params, draft_params, prompt\)\."
    with pytest.raises(ValueError, match=r"^speculate: `draft` must be .*, got dict; " + order):
        seqjax.speculate(model, params, model, params, prompts(), max_new_tokens=2, temperature=0)


def test_beams_have_a_numeric_penalty():
    model, params = small()
    with pytest.raises(ValueError, match=r"^beam_search: `length_penalty` must be a number, got"):
        seqjax.beam_search(model, params, prompts(), max_new_tokens=2, length_penalty="mean")
    with pytest.raises(ValueError, match=r"^beam_search: `num_beams` must be at most vocab_size"):
        seqjax.beam_search(model, params, prompts(), max_new_tokens=2, num_beams=VOCAB + 1)


def test_a_cache_checks_its_arguments():
    model, params = small()
    cache = seqjax.PrefixCache(max_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"^PrefixCache: `state` must be that of one sequence, .*"):
        cache.insert([1], model.initial_state(2))
    with pytest.raises(ValueError, match=r"^PrefixCache: `positions` must be from 1 to 3, .* 4\."):
        cache.prefill(model, params, [1, 2, 3], positions=[2, 4])
    for tokens in ([], [[1]], [1.0], "a", [2**32]):
        with pytest.raises(ValueError, match=r"^PrefixCache: `tokens` must be integers of shape"):
            cache.longest(tokens)
    with pytest.raises(ValueError, match=r"^PrefixCache: `max_bytes` must be an integer >= 1, got"):
        seqjax.PrefixCache(max_bytes=1.5)
    assert len(cache) == 0
