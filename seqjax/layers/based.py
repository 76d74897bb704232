"""Based and ReBased: linear attention with the second-order Taylor map of the exponential."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _feature_maps, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._exponential import normalized_attention
from seqjax.layers._math import dense, layer_normalize, merge_heads
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Based(MatrixLayer):
    """Based, linear attention with a Taylor map (arXiv 2312.04927, 2402.18668), and ReBased.

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                         per head
        phi(q) . phi(k) = 1 + s + s^2 / 2,   s = q . k / sqrt(K)
        o_t = sum_{j <= t} phi(q_t) . phi(k_j) v_j / (sum_{j <= t} phi(q_t) . phi(k_j) + eps)
        y_t = o_t W_o

    phi has M = 1 + K + K (K + 1) / 2 features, 153 for K = 16. With `rebased` (arXiv 2402.10644),

        q, k <- a_q * layernorm(q) + b_q, a_k * layernorm(k) + b_k        per head
        phi(q) . phi(k) = s^2

    with M = K (K + 1) / 2 features. The papers alternate this layer with `ShortConv` and with
    `SlidingWindowAttention` of 64 or 128 positions. Pass a list of layers to `Backbone`. With
    `rebased`, all weights of a position may be near 0, and float32 then has few digits of them.

    Departures: the authors' code has all K^2 products, with the same result. Projections start
    normal with variance 1/fan_in.

    Parameters: q_proj, k_proj [dim, H * K], v_proj [dim, H * V], out_proj [H * V, dim]; with
    `rebased` q_scale, q_bias, k_scale, k_bias [K].
    State: {"memory": [B, H, M, V], "normalizer": [B, H, M]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Based(dim=8, heads=2, head_dim=3)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 10, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H; V = dim / heads must be an integer.
      head_dim: key features per head K.
      rebased: whether to use ReBased's normalized, purely quadratic map.
      eps: constant added to the sum; by default 1e-12, and 1e-5 with `rebased`.
      norm_eps: constant added to the variance in the layer norm of `rebased`.
    """

    dim: int
    heads: int
    head_dim: int = 16
    rebased: bool = False
    eps: float | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_heads()
        _checks.positive(self, head_dim=self.head_dim)
        _checks.head_dim(self, self.dim, self.heads, None)
        self._check_positive("norm_eps")
        if self.eps is not None:
            self._check_positive("eps")

    @property
    def key_dim(self) -> int:
        """Key features per head K."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return self.dim // self.heads

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the matrices of one sequence: heads, features M, V."""
        pairs = self.head_dim * (self.head_dim + 1) // 2
        return self.heads, pairs if self.rebased else 1 + self.head_dim + pairs, self.value_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params = {**self._qkv(), "out_proj": self._outward()}
        if self.rebased:
            for name in ("q", "k"):
                for part, start in (("scale", _init.ones), ("bias", _init.zeros)):
                    params[f"{name}_{part}"] = Param((self.head_dim,), ("head_dim",), "norm", start)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        heads, rows, _ = self.memory_shape
        normalizer = jnp.zeros((batch_size, heads, rows), dtype)
        return super().make_state(batch_size, dtype) | {"normalizer": normalizer}

    def state_flops(self) -> int:
        heads, rows, values = self.memory_shape
        return 4 * heads * rows * (values + 1)  # write 2, read 2

    def _features(self, params: Params, name: str, x: jax.Array) -> jax.Array:
        """Return phi of queries ("q") or keys ("k") by head, in the state dtype."""
        x = x.astype(state_dtype(x.dtype))
        if not self.rebased:
            return _feature_maps.taylor(x)
        scale, bias = params[f"{name}_scale"], params[f"{name}_bias"]
        return _feature_maps.squared(layer_normalize(x, scale, bias, self.norm_eps))

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        q, k, v, _ = self._project(params, x, state, context)
        q, k = self._features(params, "q", q), self._features(params, "k", k)
        o, total, new_state = normalized_attention(q, k, v, None, state, context, scale=1.0)
        eps = (1e-5 if self.rebased else 1e-12) if self.eps is None else self.eps
        o = merge_heads(o / (total[..., None] + eps)).astype(x.dtype)
        return dense(o, params["out_proj"]), new_state
