"""Mamba-2: a state space with one decay per head, computed as linear attention."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.matrix_state.state_limits import StateNorm, StateWindow


@dataclasses.dataclass(frozen=True)
class Mamba2(Layer):
    """Mamba-2, the state space dual SSD (arXiv 2405.21060).

        u, B, C = silu(conv(x W_u)), silu(conv(x W_B)), silu(conv(x W_C))
        dt_t = clip(softplus(x_t W_dt + dt_bias), dt_limit)               per head
        S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t u_t)^T            [N, P] per head
        y_t = S_t^T C_t + D u_t
        out_t = norm(y_t, x_t W_z) W_out

    with u [H, P], and B and C [G, N], where each of the G groups serves H / G heads. The norm is

        norm(y, z) = rms(y * silu(z)) * scale         "gate_first", Mamba-2
        norm(y, z) = rms(y) * scale * silu(z)         "norm_first", some Falcon-H1
        norm(y, z) = y * silu(z)                      None, other Falcon-H1

    where rms divides each of `groups` equal runs of the H * P features by its root mean square.

    A starts uniform in [1, 16], softplus(dt_bias) log-uniform in [dt_min, dt_max], D as ones.

    Three options of Stuffed Mamba (arXiv 2410.07145) are for sequences much longer than the
    training sequences. They also work with trained parameters. `decay_factor` multiplies the decay
    of S, so the layer forgets more (0.9999 in the paper). `write_factor` multiplies the writes
    B_t (dt_t u_t)^T, so the layer remembers less (0.75 in the paper). `state_limit` is
    `seqjax.methods.StateNorm`, which rescales S, or `seqjax.methods.StateWindow`, which reads only
    the last steps.

    Departures: published checkpoints store the projections in one array, in the order z, u, B, C,
    dt, and the convolutions of u, B, C in another. Here each is a parameter, so that heads can be
    split over devices. Projections start normal with variance 1/fan_in.

    Parameters: in_proj, gate_proj [dim, H * P]; B_proj, C_proj [dim, G * N]; dt_proj [dim, H];
    u_conv, B_conv, C_conv (`ShortConv`); dt_bias, A_log, D [H]; norm [H * P] unless `norm` is None;
    out_proj [H * P, dim]. With `in_bias` in_bias, gate_bias [H * P], B_bias, C_bias [G * N] and
    dt_proj_bias [H], with `out_bias` out_bias [dim].
    State: {"u_conv": [B, conv_size - 1, H * P], "B_conv", "C_conv": [B, conv_size - 1, G * N],
    "memory": [B, H, N, P]}; with a `StateWindow` "memory" is the state of that window.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Mamba2(dim=8, state_dim=6, head_dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 4, 6, 4))

    Attributes:
      dim: features of input and output.
      state_dim: states N.
      head_dim: features per head P.
      heads: number of heads H; by default expand * dim / head_dim.
      expand: features of all heads per feature of the input, if `heads` is None.
      groups: number of groups G of B and C, which divides the number of heads.
      conv_size: taps of the short convolutions.
      conv_bias: whether the convolutions have a bias.
      in_bias: whether the projections of the input have a bias.
      out_bias: whether the projection of the output has a bias.
      norm: "gate_first", "norm_first", or None for a gate without norm.
      norm_eps: constant added to the mean square in the norm.
      dt_limit: smallest and largest dt; values outside are clipped.
      dt_min: smallest dt at initialization.
      dt_max: largest dt at initialization.
      decay_factor: factor of the decay of S, in (0, 1].
      write_factor: factor of the writes to S, positive.
      state_limit: a `StateNorm` or a `StateWindow`; by default S is not limited.
    """

    dim: int
    state_dim: int = 128
    head_dim: int = 64
    heads: int | None = None
    expand: float = 2
    groups: int = 1
    conv_size: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm: Literal["gate_first", "norm_first"] | None = "gate_first"
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    decay_factor: float = 1.0
    write_factor: float = 1.0
    state_limit: StateNorm | StateWindow | None = None

    def __post_init__(self) -> None:
        _checks.positive(
            self,
            dim=self.dim,
            state_dim=self.state_dim,
            head_dim=self.head_dim,
            groups=self.groups,
            conv_size=self.conv_size,
        )
        if self.heads is None:
            heads = self.expand * self.dim / self.head_dim
            _checks.require(
                self,
                heads >= 1 and heads == int(heads),
                f"`expand` * dim must be a multiple of head_dim, got expand={self.expand},"
                f" dim={self.dim}, head_dim={self.head_dim}; pass another head_dim, or heads.",
            )
        else:
            _checks.positive(self, heads=self.heads)
        _checks.require(
            self,
            self.head_count % self.groups == 0,
            f"`groups` must divide the number of heads, {self.head_count}, got {self.groups}.",
        )
        if self.norm is not None:
            _checks.one_of(self, "norm", self.norm, ("gate_first", "norm_first"))
        _checks.above_zero(self, norm_eps=self.norm_eps)
        _checks.require(
            self,
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] < self.dt_limit[1],
            f"`dt_limit` must be (low, high) with 0 <= low < high, got {self.dt_limit}.",
        )
        object.__setattr__(self, "dt_limit", tuple(self.dt_limit))
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )
        _checks.above_zero(self, decay_factor=self.decay_factor, write_factor=self.write_factor)
        _checks.require(
            self,
            self.decay_factor <= 1,
            f"`decay_factor` must be in (0, 1], got {self.decay_factor}.",
        )
        _checks.require(
            self,
            self.state_limit is None or isinstance(self.state_limit, StateNorm | StateWindow),
            f"`state_limit` must be a StateNorm, a StateWindow or None, got {self.state_limit!r}.",
        )

    @property
    def head_count(self) -> int:
        """Number of heads H: `heads`, by default expand * dim / head_dim."""
        return int(self.expand * self.dim / self.head_dim) if self.heads is None else self.heads

    def _convs(self) -> dict[str, ShortConv]:
        states = self.groups * self.state_dim
        return {
            f"{name}_conv": ShortConv(
                width, self.conv_size, bias=self.conv_bias, activation="silu", channel_axis=axis
            )
            for name, width, axis in (
                ("u", self.head_count * self.head_dim, "heads"),
                ("B", states, "group"),
                ("C", states, "group"),
            )
        }

    def declare_params(self) -> Mapping[str, Param | Layer]:
        heads, inner = self.head_count, self.head_count * self.head_dim
        widths = {
            "in": (inner, "heads"),
            "gate": (inner, "heads"),
            "B": (self.groups * self.state_dim, "group"),
            "C": (self.groups * self.state_dim, "group"),
            "dt": (heads, "heads"),
        }
        params: dict[str, Param | Layer] = {
            f"{name}_proj": Param((self.dim, width), ("embed", axis), "weight", _init.fan_in_normal)
            for name, (width, axis) in widths.items()
        }
        if self.in_bias:  # dt_bias is the bias inside the softplus
            params |= {
                "dt_proj_bias" if name == "dt" else f"{name}_bias": Param(
                    (width,), (axis,), "bias", _init.zeros
                )
                for name, (width, axis) in widths.items()
            }
        params |= self._convs()
        params |= {
            "dt_bias": Param(
                (heads,),
                ("heads",),
                "recurrence",
                _init.inverse_softplus_log_uniform(self.dt_min, self.dt_max),
            ),
            "A_log": Param((heads,), ("heads",), "recurrence", _init.log_uniform_of(1.0, 16.0)),
            "D": Param((heads,), ("heads",), "bias", _init.ones),
            "out_proj": Param((inner, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }
        if self.norm is not None:
            params["norm"] = Param((inner,), ("heads",), "norm", _init.ones)
        if self.out_bias:
            params["out_bias"] = Param((self.dim,), ("embed",), "bias", _init.zeros)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        shape = (batch_size, self.head_count, self.state_dim, self.head_dim)
        if self.state_limit is not None:
            return state | {"memory": self.state_limit.initial_state(*shape, dtype, self.groups)}
        return state | {"memory": jnp.zeros(shape, dtype)}

    def state_flops(self) -> int:
        size = self.head_count * self.state_dim * self.head_dim
        if isinstance(self.state_limit, StateWindow):  # two recurrences
            return 10 * size
        if isinstance(self.state_limit, StateNorm):  # square 1, sum 1, rescale 1
            return 8 * size
        return 5 * size  # decay 1, write 2, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        new_state, mixed = {}, []

        def project(name: str, bias: str) -> jax.Array:
            y = dense(x, params[f"{name}_proj"])
            return y + params[bias].astype(y.dtype) if self.in_bias else y

        for name, conv in self._convs().items():
            source = "in" if name == "u_conv" else name[0]
            y, new_state[name] = conv.forward(
                params[name], project(source, f"{source}_bias"), state[name], context
            )
            mixed.append(y)
        heads = self.head_count
        u = split_heads(mixed[0].astype(wide), heads)
        B, C = (split_heads(y, self.groups) for y in mixed[1:])
        dt = project("dt", "dt_proj_bias").astype(wide) + params["dt_bias"].astype(wide)
        dt = jnp.clip(jax.nn.softplus(dt), *self.dt_limit)
        log_decay, written = -jnp.exp(params["A_log"].astype(wide)) * dt, dt[..., None] * u
        if self.decay_factor != 1:
            log_decay = log_decay + math.log(self.decay_factor)
        if self.write_factor != 1:
            written = written * self.write_factor
        y, new_state["memory"] = (self.state_limit or linear_attention)(
            C,
            B,
            written,
            log_decay,
            state["memory"],
            scale=1.0,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        y = merge_heads(y + params["D"].astype(wide)[:, None] * u)
        y = self._gated_norm(params, y, project("gate", "gate_bias").astype(wide))
        out = dense(y.astype(x.dtype), params["out_proj"])
        return out + params["out_bias"].astype(out.dtype) if self.out_bias else out, new_state

    def _gated_norm(self, params: Params, y: jax.Array, z: jax.Array) -> jax.Array:
        """Return norm(y, z) of the class's docstring for y, z [B, T, H * P]."""
        gate = jax.nn.silu(z)
        if self.norm is None:
            return y * gate
        scale = params["norm"].reshape(self.groups, -1)
        runs = split_heads(y * gate if self.norm == "gate_first" else y, self.groups)
        normed = merge_heads(rms_normalize(runs, scale, self.norm_eps))
        return normed if self.norm == "gate_first" else normed * gate
