"""The damped moving average of MEGA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
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
        log = jax.nn.log_sigmoid
        # log(1 - p a) as log((1 - p) + p (1 - a)), which is finite for all alpha and delta.
        decay = jnp.logaddexp(log(-delta), log(delta) + log(-alpha))
        y, state = ssm_scan(
            x,
            decay,
            jax.nn.sigmoid(delta) * beta,
            gamma * self.state_dim**-0.5,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return jax.nn.silu(y + params["omega"].astype(x.dtype) * x), state


def _alternating(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    signs = 1 - 2 * (jnp.arange(shape[1], dtype=dtype) % 2)
    return signs + _init.normal(0.02)(key, shape, dtype)
