"""Block around a selective scan, which `Mamba` and `Longhorn` share."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.elementwise.selective_scan import selective_scan


@dataclasses.dataclass(frozen=True)
class SelectiveBlock(Layer):
    """Short convolution, selective scan, skip connection and gate; subclasses choose the decay."""

    dim: int
    state_dim: int = 16
    expand: int = 2
    conv_size: int = 4
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bias: bool = False
    conv_bias: bool = True
    inner_norm_eps: float | None = None
    inner_norm_scales: bool = False
    groups: int | None = None

    @abc.abstractmethod
    def decay_params(self) -> dict[str, Param]:
        """Return the parameters of the decay, by name."""

    @abc.abstractmethod
    def recurrence(self, params: Params, dt: jax.Array, B: jax.Array) -> dict[str, Any]:
        """Return the arguments dt, A, B and decay of `selective_scan`, from dt before its map."""

    def __post_init__(self) -> None:
        _checks.positive(
            self,
            dim=self.dim,
            state_dim=self.state_dim,
            expand=self.expand,
            conv_size=self.conv_size,
        )
        _checks.positive(self, dt_rank=self.rank)
        if self.groups is not None:
            _checks.positive(self, groups=self.groups)
            _checks.require(
                self,
                self.expand * self.dim % self.groups == 0,
                f"`groups` must divide expand * dim = {self.expand * self.dim}, got {self.groups}.",
            )
        _checks.require(
            self,
            self.inner_norm_eps is not None or not self.inner_norm_scales,
            "`inner_norm_scales` must have an inner_norm_eps, got None; pass inner_norm_eps.",
        )
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
        group = () if self.groups is None else (self.groups,)
        group_axis = (None,) * len(group)
        channels = inner // (self.groups or 1)
        params: dict[str, Param | Layer] = {
            "in_proj": inward,
            "gate_proj": inward,
            "conv": self._conv,
            "x_proj": Param(
                (*group, channels, rank + 2 * states),
                (*group_axis, "mlp", None),
                "weight",
                _init.fan_in_normal,
            ),
            "dt_proj": Param(
                (*group, rank, channels),
                (*group_axis, None, "mlp"),
                "weight",
                _init.uniform(-(rank**-0.5), rank**-0.5),
            ),
            "dt_bias": Param(
                (inner,),
                ("mlp",),
                "recurrence",
                _init.inverse_softplus_log_uniform(self.dt_min, self.dt_max),
            ),
            **self.decay_params(),
            "D": Param((inner,), ("mlp",), "bias", _init.ones),
            "out_proj": Param((inner, dim), ("mlp", "embed"), "weight", _init.fan_in_normal),
        }
        if self.bias:
            params["in_bias"] = params["gate_bias"] = Param((inner,), ("mlp",), "bias", _init.zeros)
            params["out_bias"] = Param((dim,), ("embed",), "bias", _init.zeros)
        if self.inner_norm_scales:
            for name, width in (("dt", rank), ("B", states), ("C", states)):
                params[f"{name}_norm"] = Param((width,), (None,), "norm", _init.ones)
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
            self._product(u, params["x_proj"]), [self.rank, self.rank + self.state_dim], axis=-1
        )
        if self.inner_norm_eps is not None:
            one = jnp.ones((), wide)
            low_rank, B, C = (
                rms_normalize(z, params.get(f"{name}_norm", one), self.inner_norm_eps)
                for name, z in (("dt", low_rank), ("B", B), ("C", C))
            )
        dt = self._product(low_rank, params["dt_proj"])

        def scan(
            params: Params, u: jax.Array, dt: jax.Array, B: jax.Array, C: jax.Array, state: State
        ) -> tuple[jax.Array, State]:
            return selective_scan(
                u,
                C=C,
                D=params["D"].astype(wide),
                initial_state=state,
                reset=reset,
                sequence_axis=sequence_axis,
                **self.recurrence(params, dt.astype(wide) + params["dt_bias"].astype(wide), B),
            )

        channels = {name: params[name] for name in ("dt_bias", "D", *self.decay_params())}
        ssm_state = state["ssm"]
        if self.groups is None:
            y, ssm_state = scan(channels, u, dt, B, C, ssm_state)
        else:
            channels = {
                name: p.reshape(self.groups, -1, *p.shape[1:]) for name, p in channels.items()
            }
            by_group = ssm_state.reshape(ssm_state.shape[0], self.groups, -1, self.state_dim)
            y, by_group = jax.vmap(scan, in_axes=(0, 2, 2, 2, 2, 1), out_axes=(2, 1))(
                channels, split_heads(u, self.groups), dt, B, C, by_group
            )
            y, ssm_state = merge_heads(y), by_group.reshape(ssm_state.shape)
        gate = jax.nn.silu(dense(x, params["gate_proj"], params.get("gate_bias")))
        y = dense(y * gate, params["out_proj"], params.get("out_bias"))
        return y, {"conv": conv_state, "ssm": ssm_state}

    def _product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Multiply x [B, T, I] by weight [I, O], or by group: [B, T, G * I] by [G, I, O]."""
        if self.groups is None:
            return dense(x, weight)
        by_group = x if x.ndim == 4 else split_heads(x, self.groups)
        return jnp.einsum("btgi,gio->btgo", by_group, weight.astype(x.dtype))
