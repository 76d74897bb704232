"""PPO (arXiv 1707.06347) on a recurrent actor-critic, with games inside `lax.scan`.

The model has one output per action, and the value. Its memory is cleared at the start of each
episode by the argument `reset`, in the rollout and in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.control.games import SUITS, Game


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of PPO.

    Attributes:
      envs: games that run side by side.

      rollout: steps of each game between two updates.

      epochs: passes over a rollout.

      minibatches: parts of a rollout, each with whole games.

      discount: discount of rewards.

      trace: decay of the advantage estimator (lambda).

      clip: largest change of an action's probability ratio that is rewarded.

      entropy: weight of the entropy.

      value: weight of the squared error of the value.
    """

    envs: int
    rollout: int
    epochs: int
    minibatches: int
    discount: float
    trace: float
    clip: float
    entropy: float
    value: float


class Play(NamedTuple):
    """Running games: decks [B, cards], steps [B], starts [B] bool, and the model's memory."""

    deck: jax.Array
    t: jax.Array
    fresh: jax.Array
    memory: Any


class Rollout(NamedTuple):
    """Steps of all games, each [B, T, ...]; `fresh` marks the first step of an episode."""

    observation: jax.Array
    fresh: jax.Array
    action: jax.Array
    log_probability: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def start(game: Game, model: Any, envs: int, key: jax.Array) -> Play:
    """Return games at the first step of an episode."""
    deck = jax.vmap(game.shuffle)(jax.random.split(key, envs))
    zeros = jnp.zeros(envs, jnp.int32)
    return Play(deck, zeros, jnp.ones(envs, bool), model.initial_state(envs))


def _split(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of the actions, and the value."""
    return jax.nn.log_softmax(outputs[..., :SUITS]), outputs[..., SUITS]


def _of_action(log_probabilities: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probabilities, action[..., None], axis=-1)[..., 0]


def play(
    game: Game, model: Any, params: Any, state: Play, key: jax.Array, steps: int
) -> tuple[Play, Rollout, jax.Array]:
    """Play `steps` steps; return the games, the rollout, and the value after the last step [B]."""
    envs = state.t.shape[0]
    observe, score = jax.vmap(game.observe), jax.vmap(game.reward)

    def step(state: Play, key: jax.Array) -> tuple[Play, Rollout]:
        act, deal = jax.random.split(key)
        observation = observe(state.deck, state.t)
        outputs, memory = model.step(params, observation, state.memory, reset=state.fresh)
        log_probabilities, value = _split(outputs)
        action = jax.random.categorical(act, log_probabilities)
        reward = score(state.deck, state.t, action)
        done = state.t + 1 == game.length
        new = jax.vmap(game.shuffle)(jax.random.split(deal, envs))
        after = Play(
            jnp.where(done[:, None], new, state.deck),
            jnp.where(done, 0, state.t + 1),
            done,
            memory,
        )
        chosen = _of_action(log_probabilities, action)
        return after, Rollout(observation, state.fresh, action, chosen, value, reward, done)

    state, rollout = jax.lax.scan(step, state, jax.random.split(key, steps))
    rollout = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), rollout)
    last, _ = model.step(params, observe(state.deck, state.t), state.memory, reset=state.fresh)
    return state, rollout, _split(last)[1]


def advantages(rollout: Rollout, last: jax.Array, settings: Settings) -> jax.Array:
    """Return generalized advantages [B, T] (arXiv 1506.02438); nothing crosses an episode's end.

    A_t = d_t + discount trace A_{t+1},  d_t = r_t + discount V_{t+1} - V_t
    """

    def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        after, value_after = carry
        value, reward, done = now
        left = jnp.where(done, 0.0, settings.discount)
        advantage = reward + left * value_after - value + left * settings.trace * after
        return (advantage, value), advantage

    by_time = (rollout.value.T, rollout.reward.T, rollout.done.T)
    _, result = jax.lax.scan(step, (jnp.zeros_like(last), last), by_time, reverse=True)
    return result.T


def loss(
    model: Any,
    params: Any,
    memory: Any,
    rollout: Rollout,
    advantage: jax.Array,
    settings: Settings,
) -> jax.Array:
    """Return the loss of PPO on whole games, whose memory before the rollout was `memory`."""
    outputs, _ = model.apply(params, rollout.observation, memory, reset=rollout.fresh)
    log_probabilities, value = _split(outputs)
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = jnp.exp(_of_action(log_probabilities, rollout.action) - rollout.log_probability)
    clipped = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    policy = -jnp.minimum(ratio * scaled, clipped * scaled).mean()
    error = jnp.square(value - (advantage + rollout.value)).mean()
    entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(axis=-1).mean()
    return policy + settings.value * error - settings.entropy * entropy


def make_iteration(
    game: Game, model: Any, transform: optax.GradientTransformation, settings: Settings
) -> Callable[..., Any]:
    """Return the jitted `iteration(params, optimizer, play, key)`.

    It plays a rollout and updates the parameters. It returns the new parameters, optimizer state
    and games, then the mean return of an episode and the mean loss.
    """
    parts = settings.minibatches

    @jax.jit
    def iteration(params: Any, optimizer: Any, state: Play, key: jax.Array) -> Any:
        acting, order = jax.random.split(key)
        memory = state.memory
        state, rollout, last = play(game, model, params, state, acting, settings.rollout)
        batch = (memory, rollout, advantages(rollout, last, settings))

        def update(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, optimizer = carry
            before, steps, advantage = jax.tree.map(lambda x: x[rows], batch)
            value, gradients = jax.value_and_grad(
                lambda params: loss(model, params, before, steps, advantage, settings)
            )(params)
            updates, optimizer = transform.update(gradients, optimizer, params)
            return (optax.apply_updates(params, updates), optimizer), value

        keys = jax.random.split(order, settings.epochs)
        rows = jax.vmap(lambda key: jax.random.permutation(key, settings.envs))(keys)
        rows = rows.reshape(settings.epochs * parts, settings.envs // parts)
        (params, optimizer), losses = jax.lax.scan(update, (params, optimizer), rows)
        # Episodes have one length, so the mean reward gives their mean return.
        returns = rollout.reward.mean() * game.length
        return params, optimizer, state, returns, losses.mean()

    return iteration
