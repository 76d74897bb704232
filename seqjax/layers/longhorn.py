"""Longhorn: a selective state space whose decay is the solution of an online regression."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers._base import Param, Params
from seqjax.layers._selective_block import SelectiveBlock


@dataclasses.dataclass(frozen=True)
class Longhorn(SelectiveBlock):
    """Longhorn, a state space that learns online (arXiv 2407.14207).

        u_t = silu(conv(x W_in)_t),   z_t = x_t W_gate                    [inner]
        r_t, k_t, q_t = split(u_t W_x)                                    [dt_rank], [N], [N]
        b_t = sigmoid(r_t W_dt + dt_bias)                                 [inner]
        e_t = b_t / (1 + b_t k_t . k_t)                                   [inner]
        h_t = (1 - e_t k_t^2) * h_{t-1} + e_t u_t k_t                     [inner, N]
        y_t = ((h_t q_t + D * u_t) * silu(z_t)) W_out

    Each step solves min |h - h_{t-1}|^2 + b_t |h k_t - u_t|^2, with the diagonal of the solution's
    transition as the decay. The block is that of `Mamba` without A.

    dt_bias starts as in `Mamba`: sigmoid(dt_bias) = 1 - exp(-dt) with dt log-uniform in
    [dt_min, dt_max]. D starts as ones and W_dt uniform in +-1/sqrt(dt_rank).

    Departures: W_in and W_gate are two parameters, and weights are [in, out]; other projections
    start normal with variance 1/fan_in.

    Parameters: in_proj, gate_proj [dim, inner]; conv (a `ShortConv`); x_proj [inner, dt_rank + 2N];
    dt_proj [dt_rank, inner]; dt_bias, D [inner]; out_proj [inner, dim].
    State: {"conv": [B, conv_size - 1, inner], "ssm": [B, inner, N]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Longhorn(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["ssm"].shape
      ((2, 5, 4), (2, 4), (2, 8, 8))

    Attributes:
      dim: features of input and output.
      state_dim: states per channel N.
      expand: inner = expand * dim channels.
      conv_size: taps of the short convolution.
      dt_rank: rank of the map to b; by default dim / 16, rounded up.
      dt_min: smallest dt at initialization.
      dt_max: largest dt at initialization.
      bias: whether the projections in and out have biases.
      conv_bias: whether the convolution has a bias.
      inner_norm_eps: constant added to the mean squares of r_t, B_t and C_t; by default these are
        not normalized.
      inner_norm_scales: whether these norms have scales; see `Mamba`.
      groups: number of runs of channels with their own W_x and W_dt; see `Mamba`.
    """

    def decay_params(self) -> dict[str, Param]:
        return {}

    def recurrence(self, params: Params, dt: jax.Array, B: jax.Array) -> dict[str, Any]:
        del params
        rate, key = jax.nn.sigmoid(dt), B.astype(dt.dtype)
        rate = rate / (1 + rate * jnp.sum(key * key, axis=-1, keepdims=True))
        return {"dt": rate, "A": None, "B": key, "decay": "online"}
