"""Games of memory in JAX, after POPGym (arXiv 2303.01859): pure functions of cards and time.

An episode has a fixed number of steps. Cards are a shuffled deck of four suits. Every scored action
earns 1 / n if it is right and -1 / n if not, with n scored actions in an episode.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.base.errors import UserError, nearest

SUITS = 4


@dataclasses.dataclass(frozen=True)
class Game(abc.ABC):
    """A game with a deck of `cards` cards, a multiple of four.

    All methods take one episode; `jax.vmap` takes many.
    """

    cards: int

    def __post_init__(self) -> None:
        if self.cards < SUITS or self.cards % SUITS:
            raise UserError(f"config.game.cards={self.cards}: must be a multiple of {SUITS}")

    def shuffle(self, key: jax.Array) -> jax.Array:
        """Return the suits of a shuffled deck, [cards] int32."""
        return jax.random.permutation(key, jnp.arange(self.cards, dtype=jnp.int32) % SUITS)

    @property
    @abc.abstractmethod
    def features(self) -> int:
        """Number of features of an observation."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Number of steps of an episode."""

    @abc.abstractmethod
    def observe(self, deck: jax.Array, t: jax.Array) -> jax.Array:
        """Return the observation at step t, [features] float32."""

    @abc.abstractmethod
    def answer(self, deck: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the right action at step t and whether it is scored."""

    @property
    @abc.abstractmethod
    def scored(self) -> int:
        """Number of scored actions in an episode."""

    def reward(self, deck: jax.Array, t: jax.Array, action: jax.Array) -> jax.Array:
        """Return the reward of an action at step t."""
        answer, scored = self.answer(deck, t)
        return jnp.where(scored, jnp.where(action == answer, 1.0, -1.0) / self.scored, 0.0)


@dataclasses.dataclass(frozen=True)
class RepeatPrevious(Game):
    """Name the suit that was shown `lag` steps ago (POPGym's k is `lag` + 1)."""

    lag: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lag < self.cards - 1:
            raise UserError(f"config.game.lag={self.lag}: must be 0 to {self.cards - 2}")

    @property
    def features(self) -> int:
        """Return 4: the suit."""
        return SUITS

    @property
    def length(self) -> int:
        """Return the number of cards minus one: the last card is not shown."""
        return self.cards - 1

    @property
    def scored(self) -> int:
        """Return the number of steps with a card `lag` steps ago."""
        return self.length - self.lag

    def observe(self, deck: jax.Array, t: jax.Array) -> jax.Array:
        """Return the suit of card t."""
        return jax.nn.one_hot(deck[t], SUITS)

    def answer(self, deck: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the suit of card t - lag."""
        return deck[jnp.maximum(t - self.lag, 0)], t >= self.lag


@dataclasses.dataclass(frozen=True)
class Autoencode(Game):
    """Watch the deck, then name the suits in reverse order."""

    @property
    def features(self) -> int:
        """Return 5: the suit, and a flag while the agent must only watch."""
        return SUITS + 1

    @property
    def length(self) -> int:
        """Return 2 n - 1 steps for n cards: the first answer is due when the last card is shown."""
        return 2 * self.cards - 1

    @property
    def scored(self) -> int:
        """Return the number of cards."""
        return self.cards

    def observe(self, deck: jax.Array, t: jax.Array) -> jax.Array:
        """Return the suit of card t, or zeros after the last one, and the flag."""
        card = jax.nn.one_hot(deck[jnp.minimum(t, self.cards - 1)], SUITS)
        card = jnp.where(t < self.cards, card, 0.0)
        return jnp.append(card, jnp.where(t < self.cards - 1, 1.0, 0.0))

    def answer(self, deck: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the suit of the card that is as far before the last one as t is after it."""
        place = 2 * (self.cards - 1) - t
        return deck[jnp.clip(place, 0, self.cards - 1)], t >= self.cards - 1


GAMES: dict[str, type[Game]] = {"repeat_previous": RepeatPrevious, "autoencode": Autoencode}


def make(name: str, **options: Any) -> Game:
    """Return a game by its name."""
    if name not in GAMES:
        raise UserError(f"config.game.name: unknown game {name!r}: {nearest(name, GAMES)}")
    return GAMES[name](**options)
