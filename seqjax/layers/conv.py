"""ShortConv: a causal depthwise convolution over a few positions, with carried state."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _halo, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class ShortConv(Layer):
    """Short causal convolution, as used in Mamba and DeltaNet (arXiv 2312.00752).

        y_t = activation(sum_j w_j * x_{t-j} + bias),   j = 0 .. size - 1

    elementwise per feature, with x before the start taken as zero. Parameter `weight[j]` is the
    tap of delay j (a torch `Conv1d` stores them in the opposite order). The state is the last
    `size - 1` inputs [B, size - 1, dim], oldest first. Inputs from before a reset are replaced by
    zero. Sums are taken in float32 or better. Taps start uniform in +-1/sqrt(size), as in torch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = ShortConv(dim=3, size=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 3)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 3)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 3), (2, 3), (2, 3, 3))

    Attributes:
      dim: features of input and output.
      size: number of taps, including the current position.
      bias: whether to add a bias.
      activation: 'silu', or None for none.
      channel_axis: the logical axis name of the features.
    """

    dim: int
    size: int = 4
    bias: bool = False
    activation: Literal["silu"] | None = None
    channel_axis: str = "embed"

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, size=self.size)
        _checks.require(
            self,
            self.activation in (None, "silu"),
            f"`activation` must be None or 'silu', got {self.activation!r}.",
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        bound = self.size**-0.5
        params = {
            "weight": Param(
                (self.size, self.dim),
                ("conv", self.channel_axis),
                "weight",
                _init.uniform(-bound, bound),
            )
        }
        if self.bias:
            params["bias"] = Param((self.dim,), (self.channel_axis,), "bias", _init.zeros)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.size - 1, self.dim), dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        length, past = x.shape[1], self.size - 1
        wide = state_dtype(x.dtype)
        if sequence_axis is not None:
            state = _halo.entering(state, x, reset, sequence_axis)
        weight = params["weight"].astype(wide)
        history = jnp.concatenate([state, x.astype(wide)], axis=1)
        y = jnp.zeros(x.shape, wide)
        kept = []
        cut = jnp.zeros(x.shape[:2], jnp.bool_)  # whether a reset lies after time t - delay
        for delay in range(self.size):
            tap = jax.lax.slice_in_dim(history, past - delay, past - delay + length, axis=1)
            if reset is not None:
                if delay:
                    since = jnp.pad(reset, ((0, 0), (delay - 1, 0)))[:, :length]
                    cut = cut | since
                tap = jnp.where(cut[..., None], 0, tap)
            y = y + tap * weight[delay]
            kept.append(tap[:, -1])
        if self.bias:
            y = y + params["bias"].astype(wide)
        if self.activation == "silu":
            y = jax.nn.silu(y)
        state = jnp.stack(kept[:past][::-1], axis=1) if past else state
        if sequence_axis is not None:
            state = _halo.leaving(state, sequence_axis)
        return y.astype(x.dtype), state


def qkv_convs(heads: int, key_dim: int, value_dim: int, size: int) -> dict[str, ShortConv]:
    """Return the short convolutions after the projections of q, k and v, by parameter name."""
    widths = {"q": key_dim, "k": key_dim, "v": value_dim}
    return {
        f"{name}_conv": ShortConv(heads * width, size, activation="silu", channel_axis="heads")
        for name, width in widths.items()
    }
