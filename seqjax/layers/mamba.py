"""Mamba: a selective state space after a short convolution."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers._base import Param, Params
from seqjax.layers._selective_block import SelectiveBlock


@dataclasses.dataclass(frozen=True)
class Mamba(SelectiveBlock):
    """Mamba, the selective state space S6 (arXiv 2312.00752).

        u_t = silu(conv(x W_in)_t),   z_t = x_t W_gate                    [inner]
        r_t, B_t, C_t = split(u_t W_x)                                    [dt_rank], [N], [N]
        dt_t = softplus(r_t W_dt + dt_bias)                               [inner]
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   A = -exp(A_log)       [inner, N]
        y_t = ((C_t h_t + D * u_t) * silu(z_t)) W_out

    A_log starts as log(1 .. N) in every channel (S4D-real), dt_bias such that softplus(dt_bias) is
    log-uniform in [dt_min, dt_max], D as ones, W_dt uniform in +-1/sqrt(dt_rank).

    With `negative_eigenvalues=True` the decay is 2 exp(dt_t A) - 1 instead of exp(dt_t A), so that
    a state can change its sign. State tracking tasks such as parity require it (arXiv 2411.12537).

    `bias` adds biases to W_in, W_gate and W_out. With an `inner_norm_eps` each of r_t, B_t and C_t
    is divided by sqrt(mean square + inner_norm_eps), as in Falcon Mamba (arXiv 2410.05355). With
    `inner_norm_scales` each is then multiplied by a scale, as in Jamba (arXiv 2403.19887). With
    `groups` the channels are cut into equal runs, and each run has its own W_x and W_dt, as in
    Zamba (arXiv 2405.16712).

    Departures: W_in and W_gate are two parameters, while published checkpoints store them in one (x
    half first), and weights are [in, out]; other projections start normal with variance 1/fan_in.

    Parameters: in_proj, gate_proj [dim, inner]; conv (a `ShortConv`); x_proj [inner, dt_rank + 2N];
    dt_proj [dt_rank, inner]; dt_bias, D [inner]; A_log [inner, N]; out_proj [inner, dim]; with
    `bias` in_bias, gate_bias [inner] and out_bias [dim]; with `inner_norm_scales` dt_norm
    [dt_rank], B_norm, C_norm [N]. With G = `groups`, x_proj is [G, inner / G, dt_rank + 2N] and
    dt_proj [G, dt_rank, inner / G].
    State: {"conv": [B, conv_size - 1, inner], "ssm": [B, inner, N]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Mamba(dim=4, state_dim=8)
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
      dt_rank: rank of the map to dt; by default dim / 16, rounded up.
      dt_min: smallest dt at initialization.
      dt_max: largest dt at initialization.
      bias: whether the projections in and out have biases.
      conv_bias: whether the convolution has a bias.
      inner_norm_eps: constant added to the mean squares of r_t, B_t and C_t; by default these are
        not normalized.
      inner_norm_scales: whether these norms have scales.
      groups: number of runs of channels with their own W_x and W_dt; None for one W_x [inner, ...]
        and one W_dt.
      negative_eigenvalues: whether states decay by 2 exp(dt_t A) - 1, in [-1, 1].
    """

    negative_eigenvalues: bool = False

    def decay_params(self) -> dict[str, Param]:
        shape = self.expand * self.dim, self.state_dim
        return {"A_log": Param(shape, ("mlp", "state"), "recurrence", _s4d_real)}

    def recurrence(self, params: Params, dt: jax.Array, B: jax.Array) -> dict[str, Any]:
        return {
            "dt": jax.nn.softplus(dt),
            "A": -jnp.exp(params["A_log"].astype(dt.dtype)),
            "B": B,
            "decay": "signed" if self.negative_eigenvalues else "exp",
        }


def _s4d_real(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
