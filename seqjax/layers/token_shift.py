"""TokenShift: the previous input, as the layers of RWKV and QRNN mix it in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _halo
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class TokenShift(Layer):
    """Token shift of RWKV (arXiv 2305.13048): a learned mixture of an input and the previous one.

        y_t = mix * x_t + (1 - mix) * x_{t-1}          x_0 = 0

    elementwise per feature. Where `reset` is true x_{t-1} is taken as zero.

    `mix` starts at i / dim for feature i, as for the keys of RWKV-4's first layer.

    Departures: in RWKV the mixture is a part of its time and channel mixing; here it is also a
    layer.

    Parameters: mix [dim]. State: the last input [B, 1, dim].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = TokenShift(dim=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((1, 3, 2)))
      >>> print(y[0])
      [[0.  0.5]
       [1.  1. ]
       [1.  1. ]]

    Attributes:
      dim: features of input and output.
    """

    dim: int

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {"mix": Param((self.dim,), ("embed",), "weight", _ramp)}

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return initial_shift(batch_size, self.dim, dtype)

    def state_flops(self) -> int:
        return 3 * self.dim

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        previous, state = shift(x, state, context)
        return previous + params["mix"].astype(x.dtype) * (x - previous), state


def initial_shift(batch_size: int, dim: int, dtype: Any) -> jax.Array:
    """Return the state of `shift` before the first step: zeros [B, 1, D]."""
    return jnp.zeros((batch_size, 1, dim), dtype)


def shift(x: jax.Array, state: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Return x_{t-1} for every step t, zero at resets, and the next call's state.

    Args:
      x: [B, T, D].
      state: the input [B, 1, D] before the first step, from `initial_shift` or an earlier call.
      context: supplies `reset` and `sequence_axis`.

    Returns:
      (x_{t-1} [B, T, D] in the dtype of `x`, the last input [B, 1, D] in the dtype of `state`).
    """
    last = x[:, -1:].astype(state.dtype)
    if context.sequence_axis is not None:
        state = _halo.entering(state, x, context.reset, context.sequence_axis)
        last = _halo.leaving(last, context.sequence_axis)
    previous = jnp.concatenate([state.astype(x.dtype), x[:, :-1]], axis=1)
    if context.reset is not None:
        previous = jnp.where(context.reset[..., None], jnp.zeros_like(previous), previous)
    return previous, last


def _ramp(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.arange(shape[0], dtype=dtype) / shape[0]
