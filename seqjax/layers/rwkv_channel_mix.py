"""RWKVChannelMix: the MLP of RWKV, which also reads the previous position."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from seqjax.layers import _checks, _init, _rwkv
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.layers.token_shift import initial_shift, shift


@dataclasses.dataclass(frozen=True)
class RWKVChannelMix(Layer):
    """Channel mixing of RWKV-4 (arXiv 2305.13048), -5, -6 (2404.05892) and -7 (2503.14456).

        x^c_t = x_t + (x_{t-1} - x_t) x_c                       c in k, r
        y_t = relu(x^k_t W_k)^2 W_v                             version 7
        y_t = sigmoid(x^r_t W_r) * (relu(x^k_t W_k)^2 W_v)      versions 4, 5 and 6

    Where `reset` is true, x_{t-1} is zero. Pass the layer as the `mlp` of a `Block`.

    The versions differ in the receptance W_r, the default width and the initial values of x_k and
    x_r. For these pass the place of the block in the model, `layer` and `depth`.

    Departures: weights start normal with variance 1 / fan_in, or with `zero_init` W_v and W_r at 0
    as in the authors' code.

    Parameters: x_k [dim], key_proj [dim, hidden_dim], value_proj [hidden_dim, dim]; versions 4, 5
    and 6 also x_r [dim], receptance_proj [dim, dim].
    State: the last input [B, 1, dim].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RWKVChannelMix(dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y.shape, state.shape, layer.inner_dim
      ((2, 5, 4), (2, 1, 4), 16)

    Attributes:
      dim: features of input and output.
      version: 4, 5, 6 or 7.
      hidden_dim: features between the two products; by default 3.5 dim for versions 5 and 6,
        rounded down, and 4 dim for versions 4 and 7.
      layer: index of the block in the model, for the initial values.
      depth: number of blocks of the model, for the initial values.
      zero_init: whether W_v and W_r start at 0.
      present_share: whether the shares x_c are those of the present input, as in checkpoints of
        RWKV-4 and -5: x^c_t = x_{t-1} + (x_t - x_{t-1}) x_c.
    """

    dim: int
    version: int = 7
    hidden_dim: int | None = None
    layer: int = 0
    depth: int = 1
    zero_init: bool = False
    present_share: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, hidden_dim=self.inner_dim)
        _checks.require(
            self,
            self.version in (4, 5, 6, 7),
            f"`version` must be 4, 5, 6 or 7, got {self.version!r}.",
        )
        _rwkv.check_layer_index(self)

    @property
    def inner_dim(self) -> int:
        """Features between the two products: `hidden_dim`, or its default."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return 7 * self.dim // 2 if self.version in (5, 6) else 4 * self.dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, inner = self.dim, self.inner_dim
        share = functools.partial(_rwkv.declare_share, dim, present=self.present_share)
        power = _rwkv.depth_ratios(self)[1] ** (4 if self.version == 7 else 1)
        last = _init.zeros if self.zero_init else _init.fan_in_normal
        params = {
            "x_k": share(power),
            "key_proj": Param((dim, inner), ("embed", "mlp"), "weight", _init.fan_in_normal),
            "value_proj": Param((inner, dim), ("mlp", "embed"), "weight", last),
        }
        if self.version < 7:
            params |= {
                "x_r": share(power),
                "receptance_proj": Param((dim, dim), (None, "embed"), "weight", last),
            }
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return initial_shift(batch_size, self.dim, dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        previous, last = shift(x, state, context)

        def mixed(name: str) -> jax.Array:
            return _rwkv.mix(x, previous, params[f"x_{name}"], self.present_share)

        key = dense(mixed("k"), params["key_proj"])
        y = dense(jax.nn.relu(key) ** 2, params["value_proj"])
        if self.version < 7:
            receptance = dense(mixed("r"), params["receptance_proj"])
            y = jax.nn.sigmoid(receptance) * y
        return y, last
