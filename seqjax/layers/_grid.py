"""Base class of layers over a grid [B, X, Y, dim], such as images, in several orientations."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Params, State
from seqjax.layers.context import Context

Flips = tuple[tuple[bool, bool], ...]
FOUR: Flips = ((False, False), (True, False), (False, True), (True, True))


class GridLayer(Layer):
    """Base class of layers with inputs [B, X, Y, dim]; a subclass defines `mix`.

    A grid has no time: the layers have `init` and `apply`, but no `step`, states, resets or
    sequence axis. The field `flips` lists the orientations: for each, whether the recurrence runs
    backwards along X and along Y.
    """

    flips: Flips

    @abc.abstractmethod
    def mix(self, params: Params, x: jax.Array) -> jax.Array:
        """Compute `apply` on checked arguments: [B, X, Y, dim] -> [B, X, Y, dim]."""

    @property
    def causal(self) -> bool:
        return False

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        if context.sequence_axis is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: there is no `sequence_axis` for a layer over a grid; split"
                " the batch over devices."
            )
        return self.mix(params, x), state

    def _check_call(
        self, params: Params, x: jax.Array, state: State, reset: Any, *, one_step: bool
    ) -> tuple[State, jax.Array | None]:
        if reset is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: there are no resets for a layer over a grid; put every"
                " grid in its own batch row."
            )
        return super()._check_call(params, x, state, reset, one_step=one_step)

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        _checks.require(
            self,
            x.ndim == 4 and x.shape[-1] == self.dim,
            f"`x` must have shape [B, X, Y, {self.dim}], got {list(x.shape)}.",
        )
        batch, rows, columns, dim = x.shape
        _checks.features(self, x.reshape(batch, rows * columns, dim), self.dim, one_step)
        return x.dtype

    def _check_flips(self) -> None:
        try:
            pairs = tuple(tuple(map(bool, pair)) for pair in self.flips)
        except TypeError:
            pairs = ()
        _checks.require(
            self,
            0 < len(pairs) == len(set(pairs)) and all(len(pair) == 2 for pair in pairs),
            "`flips` must be different pairs of booleans (backwards along X, backwards along Y),"
            f" got {self.flips!r}.",
        )
        object.__setattr__(self, "flips", pairs)  # hashable, also if they were lists

    def oriented(self, z: jax.Array) -> jax.Array:
        """Return z [B, X, Y, ...] flipped for each orientation: [O, B, X, Y, ...]."""
        return jnp.stack([jnp.flip(z, _axes(pair)) for pair in self.flips])

    def each_oriented(self, z: jax.Array) -> jax.Array:
        """Return [O, B, X, Y, ...]: the parts of z [B, X, Y, O, ...], each flipped."""
        parts = [jnp.flip(z[:, :, :, o], _axes(pair)) for o, pair in enumerate(self.flips)]
        return jnp.stack(parts)

    def summed(self, z: jax.Array) -> jax.Array:
        """Return the sum over orientations of z [O, B, X, Y, ...], each flipped back."""
        parts = [jnp.flip(part, _axes(pair)) for part, pair in zip(z, self.flips, strict=True)]
        return sum(parts[1:], start=parts[0])


def _axes(pair: Sequence[bool]) -> tuple[int, ...]:
    return tuple(axis for axis, flipped in zip((1, 2), pair, strict=True) if flipped)
