"""The damped moving averages of MEGA and Megalodon."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers.context import Context
from seqjax.ops.elementwise.ssm_scan import ssm_scan


@dataclasses.dataclass(frozen=True)
class DampedEMA(Layer):
    """Multi-dimensional damped exponential moving average of MEGA (arXiv 2209.10655).

        p = sigmoid(delta),   a = sigmoid(alpha)                  [dim, N]
        h_t = (1 - p a) * h_{t-1} + p beta x_t                    h [dim, N]
        y_t = silu(sum over N of gamma * h_t / sqrt(N) + omega * x_t)

    Each channel has N separate averages. alpha and delta start normal with standard deviation
    0.2, beta as 1, -1, 1, ... plus normal numbers with standard deviation 0.02, gamma and omega
    standard normal.

    Departures: the attention around the average is not part of the layer, and the average runs
    forward only.

    Parameters: alpha, delta, beta, gamma [dim, N]; omega [dim]. State: h [B, dim, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = DampedEMA(dim=4, state_dim=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4, 2))

    Attributes:
      dim: features of input and output.
      state_dim: averages N per channel.
    """

    dim: int
    state_dim: int = 16

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        shape, axes = (self.dim, self.state_dim), ("embed", "state")
        return {
            "alpha": Param(shape, axes, "recurrence", _init.normal(0.2)),
            "delta": Param(shape, axes, "recurrence", _init.normal(0.2)),
            "beta": Param(shape, axes, "recurrence", _alternating),
            "gamma": Param(shape, axes, "recurrence", _init.normal(1.0)),
            "omega": Param((self.dim,), ("embed",), "bias", _init.normal(1.0)),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.dim, self.state_dim), dtype)

    def state_flops(self) -> int:
        return 6 * self.dim * self.state_dim

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        alpha, delta, beta, gamma = (
            params[name].astype(wide) for name in ("alpha", "delta", "beta", "gamma")
        )
        y, state = ssm_scan(
            x,
            _log_decay(alpha, delta),
            jax.nn.sigmoid(delta) * beta,
            gamma * self.state_dim**-0.5,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return jax.nn.silu(y + params["omega"].astype(x.dtype) * x), state


@dataclasses.dataclass(frozen=True)
class CEMA(Layer):
    """Complex exponential moving average of Megalodon (arXiv 2404.08801).

        p = sigmoid(alpha),   d = sigmoid(delta)                  [dim, N]
        phi_n = 2 pi n sigmoid(theta) / N                         n = 1 .. N
        h_t = (1 - p d) exp(i phi) * h_{t-1} + p x_t              h [dim, N], complex
        y_t = Re(sum over N of gamma * h_t) / sqrt(N) + omega * x_t

    Each channel has N separate averages, which turn by multiples of one frequency. alpha and delta
    start normal with standard deviation 0.2. The frequencies sigmoid(theta) start at
    dim^(-j / dim), j = 1 .. dim, in a random order. The real part of gamma starts standard normal,
    its imaginary part at 0. omega starts normal with standard deviation 0.25, cut off at 1.

    Departures: none from the authors' code. In the paper the input has the phase of the decay as
    well, and a factor beta, which gamma can express, and there is no omega.

    Parameters: alpha, delta [dim, N]; theta, omega [dim]; gamma [2, dim, N], real and imaginary
    part. State: h [B, dim, N], complex64 (complex128).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = CEMA(dim=4, state_dim=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4, 2))

    Attributes:
      dim: features of input and output, at least 2.
      state_dim: averages N per channel.
    """

    dim: int
    state_dim: int = 16

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim)
        _checks.require(self, self.dim > 1, f"`dim` must be at least 2, got {self.dim}.")

    def declare_params(self) -> Mapping[str, Param | Layer]:
        shape, axes = (self.dim, self.state_dim), ("embed", "state")
        return {
            "alpha": Param(shape, axes, "recurrence", _init.normal(0.2)),
            "delta": Param(shape, axes, "recurrence", _init.normal(0.2)),
            "theta": Param((self.dim,), ("embed",), "recurrence", _frequencies),
            "gamma": Param((2, *shape), (None, *axes), "recurrence", _real_normal),
            "omega": Param((self.dim,), ("embed",), "bias", _truncated_normal),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.dim, self.state_dim), complex_dtype(dtype))

    def state_flops(self) -> int:
        return 12 * self.dim * self.state_dim  # decay 6, write 2, read 4

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        alpha, delta, theta, gamma = (
            params[name].astype(wide) for name in ("alpha", "delta", "theta", "gamma")
        )
        multiples = jnp.arange(1, self.state_dim + 1, dtype=wide) / self.state_dim
        phases = 2 * jnp.pi * jax.nn.sigmoid(theta)[:, None] * multiples
        y, state = ssm_scan(
            x,
            jax.lax.complex(_log_decay(alpha, delta), phases),
            jax.nn.sigmoid(alpha),
            jax.lax.complex(gamma[0], gamma[1]) * self.state_dim**-0.5,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return y + params["omega"].astype(x.dtype) * x, state


def _log_decay(alpha: jax.Array, delta: jax.Array) -> jax.Array:
    """Return log(1 - sigmoid(alpha) sigmoid(delta)), finite for all alpha and delta."""
    log = jax.nn.log_sigmoid
    return jnp.logaddexp(log(-delta), log(delta) + log(-alpha))


def _frequencies(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return logits of dim^(-j / dim), j = 1 .. dim, in a random order."""
    [dim] = shape
    rates = dim ** (-jnp.arange(1, dim + 1, dtype=dtype) / dim)
    rates = jax.random.permutation(key, rates)
    return jnp.log(rates / (1 - rates))


def _real_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(jax.random.normal(key, shape[1:], dtype))


def _truncated_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.25 * jax.random.truncated_normal(key, -4, 4, shape, dtype)


def _alternating(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    signs = 1 - 2 * (jnp.arange(shape[1], dtype=dtype) % 2)
    return signs + _init.normal(0.02)(key, shape, dtype)
