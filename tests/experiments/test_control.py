"""Games of memory, PPO's advantages and loss, and a run."""

import dataclasses
import functools
import json

import numpy as np
import pytest

pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp

from experiments import train
from experiments.base import build, logs
from experiments.base.errors import UserError
from experiments.configs import control as config
from experiments.control import games, ppo
from experiments.objectives import protocol

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = ppo.Settings(4, 8, 1, 2, discount=0.9, trace=0.8, clip=0.2, entropy=0.01, value=0.5)


def episode(game, deck):
    """Return the observations, and the answers of the scored steps."""
    deck, steps = jnp.asarray(deck), jnp.arange(game.length)
    seen = jax.vmap(lambda t: game.observe(deck, t))(steps)
    answers, scored = jax.vmap(lambda t: game.answer(deck, t))(steps)
    best = jax.vmap(lambda t, a: game.reward(deck, t, a))(steps, answers)
    worst = jax.vmap(lambda t, a: game.reward(deck, t, a))(steps, (answers + 1) % 4)
    assert float(best.sum()) == pytest.approx(1)
    assert float(worst.sum()) == pytest.approx(-1)
    assert int(scored.sum()) == game.scored
    return np.asarray(seen), np.asarray(answers)[np.asarray(scored)].tolist()


def test_games_ask_for_what_was_shown():
    deck = [0, 1, 2, 3, 3, 2, 1, 0]
    seen, answers = episode(games.make("repeat_previous", cards=8, lag=2), deck)
    assert seen.argmax(axis=1).tolist() == deck[:7]
    assert answers == deck[:5]
    seen, answers = episode(games.make("autoencode", cards=8), deck)
    assert seen[:8, :4].argmax(axis=1).tolist() == deck
    assert not seen[8:].any()
    assert seen[:, 4].tolist() == [1] * 7 + [0] * 8
    assert answers == deck[::-1]
    dealt = games.make("autoencode", cards=8).shuffle(jax.random.key(0))
    assert np.bincount(dealt).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "autoencoder", "cards": 8}, "did you mean 'autoencode'"),
        ({"name": "autoencode", "cards": 6}, "cards=6: must be a multiple of 4"),
        ({"name": "repeat_previous", "cards": 8, "lag": 7}, "lag=7: must be 0 to 6"),
    ],
)
def test_bad_games_end_with_one_line(options, words):
    with pytest.raises(UserError, match=words):
        games.make(**options)


def test_advantages_stop_at_the_end_of_an_episode():
    rng = np.random.default_rng(0)
    value, reward = rng.normal(size=(2, 3, 10))
    done, last = rng.random((3, 10)) < 0.3, rng.normal(size=3)
    rollout = ppo.Rollout(None, None, None, None, *map(jnp.asarray, (value, reward, done)))
    result = np.asarray(ppo.advantages(rollout, jnp.asarray(last), SETTINGS))
    for b in range(3):
        after, value_after = 0.0, last[b]
        for t in reversed(range(10)):
            left = 0.0 if done[b, t] else 0.9
            after = reward[b, t] + left * value_after - value[b, t] + left * 0.8 * after
            value_after = value[b, t]
            np.testing.assert_allclose(result[b, t], after, rtol=1e-5, atol=1e-5)


def test_the_loss_reads_the_memory_of_the_rollout():
    """Compare the model step by step, as it plays, with all steps at once, as it learns."""
    game = games.make("repeat_previous", cards=8, lag=2)
    settings = config.get_config("repeat_previous,gru,quicktest")
    model = build.build_feature_model(settings.model, game.features, games.SUITS + 1)
    params = model.init(jax.random.key(0))
    state = ppo.start(game, model, 4, jax.random.key(1))
    run = jax.jit(lambda state, key: ppo.play(game, model, params, state, key, 10))
    state, _, _ = run(state, jax.random.key(2))
    after, rollout, last = run(state, jax.random.key(3))
    assert rollout.done.sum() == 4  # each game's second episode ends
    assert (rollout.fresh[:, 1:] == rollout.done[:, :-1]).all()
    outputs, _ = model.apply(params, rollout.observation, state.memory, reset=rollout.fresh)
    log_probabilities = jax.nn.log_softmax(outputs[..., :4])
    chosen = np.take_along_axis(np.asarray(log_probabilities), rollout.action[..., None], 2)
    np.testing.assert_allclose(chosen[..., 0], rollout.log_probability, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs[..., 4], rollout.value, rtol=1e-4, atol=1e-5)
    # With unchanged parameters all ratios are 1, and the policy's part of the loss is 0.
    plain = dataclasses.replace(SETTINGS, entropy=0.0, value=0.0)
    advantage = ppo.advantages(rollout, last, plain)
    value = ppo.loss(model, params, state.memory, rollout, advantage, plain)
    assert float(value) == pytest.approx(0, abs=1e-5)
    assert (after.t == (state.t + 10) % 7).all()


def test_the_dtype_of_the_config_is_that_of_the_activations():
    """Play games with a model in bfloat16, whose memory is that of the float32 model."""
    game = games.make("repeat_previous", cards=8, lag=2)
    settings = config.get_config("repeat_previous,gru,quicktest")
    rollouts = []
    for dtype in ("float32", "bfloat16"):
        settings.model.dtype = dtype
        model = build.build_feature_model(settings.model, game.features, games.SUITS + 1)
        params = model.init(jax.random.key(0))
        state = ppo.start(game, model, 4, jax.random.key(1))
        run = jax.jit(functools.partial(ppo.play, game, model, steps=5))
        rollouts.append(run(params, state, jax.random.key(2))[1])
    exact, narrow = (np.asarray(rollout.value[:, 0]) for rollout in rollouts)
    assert exact.dtype == narrow.dtype == np.float32
    assert 0 < np.abs(narrow - exact).max() < 0.05 * np.abs(exact).max()


def test_a_run_leaves_its_results(tmp_path):
    chosen = config.get_config("autoencode,mingru,quicktest")
    summary = train.train(chosen, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert -1 <= summary["return"] <= 1
    assert (summary["step"], summary["tokens"]) == (2, 2 * 4 * 8)
    assert [row["step"] for row in logs.read_rows(tmp_path)] == [1, 2]
    assert train.default_workdir(chosen) == "runs/autoencode-mingru-quicktest"
    chosen.control.minibatches = 3
    with pytest.raises(UserError, match=r"minibatches=3 must divide config\.control\.envs=4"):
        train.train(chosen, tmp_path)
    with pytest.raises(UserError, match=r"only experiments\.train runs games"):
        protocol.make(chosen)
