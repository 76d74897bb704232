"""Mamba: a selective state space after a short convolution."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, rms_normalize
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.elementwise.selective_scan import selective_scan


@dataclasses.dataclass(frozen=True)
class Mamba(Layer):
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
    is divided by sqrt(mean square + inner_norm_eps), as in Falcon Mamba (arXiv 2410.05355).

    Departures: W_in and W_gate are two parameters, while published checkpoints store them in one (x
    half first), and weights are [in, out]; other projections start normal with variance 1/fan_in.

    Parameters: in_proj, gate_proj [dim, inner]; conv (a `ShortConv`); x_proj [inner, dt_rank + 2N];
    dt_proj [dt_rank, inner]; dt_bias, D [inner]; A_log [inner, N]; out_proj [inner, dim]; with
    `bias` in_bias, gate_bias [inner] and out_bias [dim].
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
      dt_min: smallest dt at initialisation.
      dt_max: largest dt at initialisation.
      negative_eigenvalues: whether states decay by 2 exp(dt_t A) - 1, in [-1, 1].
      bias: whether the projections in and out have biases.
      conv_bias: whether the convolution has a bias.
      inner_norm_eps: constant added to the mean squares of r_t, B_t and C_t; by default these are
        not normalized.
    """

    dim: int
    state_dim: int = 16
    expand: int = 2
    conv_size: int = 4
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    negative_eigenvalues: bool = False
    bias: bool = False
    conv_bias: bool = True
    inner_norm_eps: float | None = None

    def __post_init__(self) -> None:
        _checks.positive(
            self,
            dim=self.dim,
            state_dim=self.state_dim,
            expand=self.expand,
            conv_size=self.conv_size,
        )
        _checks.positive(self, dt_rank=self.rank)
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )

    @property
    def rank(self) -> int:
        """Rank of the map to dt: `dt_rank`, by default dim / 16, rounded up."""
        return -(-self.dim // 16) if self.dt_rank is None else self.dt_rank

    @property
    def _conv(self) -> ShortConv:
        return ShortConv(
            self.expand * self.dim,
            self.conv_size,
            bias=self.conv_bias,
            activation="silu",
            channel_axis="mlp",
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, inner, states, rank = self.dim, self.expand * self.dim, self.state_dim, self.rank
        inward = Param((dim, inner), ("embed", "mlp"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {
            "in_proj": inward,
            "gate_proj": inward,
            "conv": self._conv,
            "x_proj": Param(
                (inner, rank + 2 * states), ("mlp", None), "weight", _init.fan_in_normal
            ),
            "dt_proj": Param(
                (rank, inner), (None, "mlp"), "weight", _init.uniform(-(rank**-0.5), rank**-0.5)
            ),
            "dt_bias": Param(
                (inner,),
                ("mlp",),
                "recurrence",
                _init.inverse_softplus_log_uniform(self.dt_min, self.dt_max),
            ),
            "A_log": Param((inner, states), ("mlp", "state"), "recurrence", _s4d_real),
            "D": Param((inner,), ("mlp",), "bias", _init.ones),
            "out_proj": Param((inner, dim), ("mlp", "embed"), "weight", _init.fan_in_normal),
        }
        if self.bias:
            params["in_bias"] = params["gate_bias"] = Param((inner,), ("mlp",), "bias", _init.zeros)
            params["out_bias"] = Param((dim,), ("embed",), "bias", _init.zeros)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "conv": self._conv.make_state(batch_size, dtype),
            "ssm": jnp.zeros((batch_size, self.expand * self.dim, self.state_dim), dtype),
        }

    def state_flops(self) -> int:
        # exp(dt A) 2, dt B x 2, decay and add 2, C h 2
        return 8 * self.expand * self.dim * self.state_dim

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        u, conv_state = self._conv.forward(
            params["conv"],
            dense(x, params["in_proj"], params.get("in_bias")),
            state["conv"],
            context,
        )
        low_rank, B, C = jnp.split(
            dense(u, params["x_proj"]), [self.rank, self.rank + self.state_dim], axis=-1
        )
        if self.inner_norm_eps is not None:
            one = jnp.ones((), wide)
            low_rank, B, C = (rms_normalize(z, one, self.inner_norm_eps) for z in (low_rank, B, C))
        dt = dense(low_rank, params["dt_proj"]).astype(wide) + params["dt_bias"].astype(wide)
        y, ssm_state = selective_scan(
            u,
            jax.nn.softplus(dt),
            -jnp.exp(params["A_log"].astype(wide)),
            B,
            C,
            params["D"].astype(wide),
            state["ssm"],
            reset=reset,
            negative_eigenvalues=self.negative_eigenvalues,
            sequence_axis=sequence_axis,
        )
        gate = jax.nn.silu(dense(x, params["gate_proj"], params.get("gate_bias")))
        y = dense(y * gate, params["out_proj"], params.get("out_bias"))
        return y, {"conv": conv_state, "ssm": ssm_state}


def _s4d_real(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
