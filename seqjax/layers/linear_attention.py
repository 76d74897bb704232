"""Linear attention with a feature map and a normalizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _feature_maps
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._exponential import normalized_attention
from seqjax.layers._math import dense, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention

FeatureMap = Literal["elu", "relu", "softmax", "dpfp", "performer", "identity"]


@dataclasses.dataclass(frozen=True)
class LinearAttention(MatrixLayer):
    """Causal linear attention with a feature map phi (arXiv 2006.16236).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                         per head
        S_t = S_{t-1} + phi(k_t) v_t^T                                    [M, V] per head
        n_t = n_{t-1} + phi(k_t)                                          [M]
        o_t = S_t^T phi(q_t) / (n_t . phi(q_t) + eps)                     normalizer="sum"
        o_t = rms(S_t^T phi(q_t)) * scale                                 normalizer="rms"
        y_t = o_t W_o

    The feature maps, with M features, are

        "elu"        elu(x) + 1                                           M = K
        "relu"       max(x, 0)                                            M = K
        "softmax"    softmax(x)                                           M = K
        "dpfp"       r * roll(r, j) for j = 1 .. map_order                M = 2 * map_order * K
                     with r = relu([x, -x]), arXiv 2102.11174
        "performer"  exp(w . x - x . x / 2) / sqrt(M), 2009.14794         M = map_order * K
        "identity"   x                                                    M = K

    "performer" divides x by K^(1/4), so that products of features approximate exp(q . k / sqrt(K)).
    Its directions w are constants: orthogonal blocks, drawn from `seed`. `Based` has a Taylor map.

    normalizer="rms" is TransNormer's NormAttention (arXiv 2210.10340): a norm over all heads takes
    the place of the quotient. Without a normalizer, o_t = S_t^T phi(q_t).

    Departures: the Performer draws new directions during training, and subtracts a maximum over all
    keys. Here none is subtracted, and features of very long keys underflow. TransNormer has local
    attention in its first blocks: pass a list of layers to `Backbone`. TransNormer's
    variant T2 has the map "elu". The authors' code of TransNormer also rotates q and k by learned
    angles (LRPE), and its norm has no scale. Projections start normal with variance 1/fan_in.

    Parameters: q_proj, k_proj [dim, H * K], v_proj [dim, H * V], out_proj [H * V, dim]; with
    normalizer="rms" norm [H * V]. State: {"memory": [B, H, M, V]}, with normalizer="sum" also
    {"normalizer": [B, H, M]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LinearAttention(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape, state["normalizer"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4), (2, 2, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * dim / heads, which must be an integer.
      feature_map: the name of phi.
      map_order: a factor of the number of features of "dpfp" and "performer".
      seed: seed of the directions of "performer".
      normalizer: "sum", "rms", or None for none.
      eps: constant added to the sum, or to the mean square of the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: float = 1
    feature_map: FeatureMap = "elu"
    map_order: int = 1
    seed: int = 0
    normalizer: Literal["sum", "rms"] | None = "sum"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, map_order=self.map_order)
        _checks.one_of(self, "feature_map", self.feature_map, _feature_maps.FEATURE_MAPS)
        self._check_width("expand_v", self.expand_v * self.dim / self.heads)
        self._check_positive("eps")
        if self.normalizer is not None:
            _checks.one_of(self, "normalizer", self.normalizer, ("sum", "rms"))
        _checks.require(
            self,
            self.feature_map != "identity" or self.normalizer != "sum",
            "`feature_map` must have positive features with normalizer='sum', got 'identity'; pass"
            " normalizer='rms'.",
        )

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.dim / self.heads)

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the matrices of one sequence: heads, features M, V."""
        rows = _feature_maps.width(self.feature_map, self.key_dim, self.map_order)
        return self.heads, rows, self.value_dim

    @property
    def directions(self) -> Any:
        """Directions w of the map "performer": a NumPy array [K, M]."""
        return _feature_maps.random_directions(self.key_dim, self.map_order, self.seed)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        norm: dict[str, Param | Layer] = {"norm": self._wide_norm()}
        return {
            **self._qkv(),
            **(norm if self.normalizer == "rms" else {}),
            "out_proj": self._outward(),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = super().make_state(batch_size, dtype)
        if self.normalizer == "sum":
            heads, rows, _ = self.memory_shape
            state["normalizer"] = jnp.zeros((batch_size, heads, rows), dtype)
        return state

    def state_flops(self) -> int:
        heads, rows, values = self.memory_shape
        return 4 * heads * rows * (values + (self.normalizer == "sum"))  # write 2, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        q, k, v, _ = self._project(params, x, state, context)
        q, k = (
            _feature_maps.features(self.feature_map, z, self.map_order, self.seed) for z in (q, k)
        )
        if self.normalizer == "sum":
            o, total, new_state = normalized_attention(q, k, v, None, state, context, scale=1.0)
            o = merge_heads(o / (total[..., None] + self.eps)).astype(x.dtype)
        else:
            o, memory = linear_attention(
                q,
                k,
                v,
                None,
                state["memory"],
                scale=1.0,
                reset=context.reset,
                sequence_axis=context.sequence_axis,
            )
            o, new_state = merge_heads(o), {"memory": memory}
            if self.normalizer == "rms":
                o = rms_normalize(o, params["norm"], self.eps)
        return dense(o, params["out_proj"]), new_state
