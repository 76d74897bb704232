"""HGRN2: gated linear attention whose keys are the complement of the decay."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _lower_bound
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class HGRN2(MatrixLayer):
    """HGRN2, gated linear RNN with state expansion (arXiv 2404.07904).

        q_t, v_t = silu(x_t W_q), x_t W_i                                 per head
        f_t = b + (1 - b) * sigmoid(x_t W_f)                              b: the block's lower bound
        S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T                         [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = rmsnorm(o_t) W_o                                            norm over all heads

    In a `Backbone` the lower bounds grow with depth, so that later blocks remember longer:

        b_l = s_1 + ... + s_l,    s = softmax(p) over blocks              block l of L, b_0 = 0

    b_l starts at l / L. Outside a backbone, or without `lower_bound`, b is 0. The backbone hands
    the parameters p of all blocks to each block.

    Departures: the form is that of flash-linear-attention. The authors' code has
    q = sigmoid(x W_q), v = silu(x W_i), a layer norm and biases. Projections start normal with
    variance 1/fan_in.

    Parameters: q_proj, forget_proj [dim, H * K], input_proj [dim, H * V], norm [H * V], out_proj
    [H * V, dim]; with `lower_bound` lower_bound [H * K] (p_l).
    State: {"memory": [B, H, K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = HGRN2(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K = V; by default dim / heads. The paper uses 128.
      lower_bound: whether the forget gates have lower bounds.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    lower_bound: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_positive("norm_eps")

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        width = self.heads * self.key_dim
        bound = {"lower_bound": _lower_bound.declare(width)} if self.lower_bound else {}
        return {
            "q_proj": self._inward(width),
            "forget_proj": self._inward(width),
            "input_proj": self._inward(width),
            **bound,
            "norm": self._wide_norm(),
            "out_proj": self._outward(),
        }

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return _lower_bound.initial_values(self.heads * self.key_dim) if self.lower_bound else {}

    def visible_params(self, params: Params) -> dict[str, list[jax.Array]]:
        return _lower_bound.visible_params(params["lower_bound"]) if self.lower_bound else {}

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        forget = dense(x, params["forget_proj"]).astype(wide)
        room = jnp.ones((), wide)
        if self.lower_bound:
            room = _lower_bound.room_above(self.heads * self.key_dim, wide, context)
        # 1 - f as a product: a difference has no digits left for f near 1.
        k = room * jax.nn.sigmoid(-forget)
        o, memory = linear_attention(
            split_heads(jax.nn.silu(dense(x, params["q_proj"])), self.heads),
            split_heads(k, self.heads),
            split_heads(dense(x, params["input_proj"]), self.heads),
            split_heads(_log_forget(room, forget), self.heads),
            state["memory"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = rms_normalize(merge_heads(o), params["norm"], self.norm_eps)
        return dense(o, params["out_proj"]), {"memory": memory}


def _log_forget(room: jax.Array, forget: jax.Array) -> jax.Array:
    """Return log(1 - room + room * sigmoid(forget)), finite for room = 1 and any `forget`."""
    free = jax.nn.log_sigmoid(forget)
    bounded = room < 1
    # Any number in (0, 1) where there is no bound: the unused branch must have finite gradients.
    room = jnp.where(bounded, room, 0.5)
    return jnp.where(bounded, jnp.logaddexp(jnp.log1p(-room), jnp.log(room) + free), free)
