"""Aaren: attention of one learned query, as a recurrence."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._exponential import stabilize
from seqjax.layers._math import dense, merge_heads, split_heads, wide_dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.linear_scan import linear_scan


@dataclasses.dataclass(frozen=True)
class Aaren(Layer):
    """Attention as a recurrent network, Aaren (arXiv 2405.13956).

        k_t, v_t = x_t W_k, x_t W_v                              per head
        s_t = q^T k_t / sqrt(K)                                  q learned, the same for all t
        o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)
        y_t = o_t W_o

    Both sums are stored times exp(-m_t), with m_t the largest score so far.

    Departures: in the paper one learned token enters the first layer, and each layer projects it to
    a query. Here each layer has a query per head. The paper's initialization of the token is not
    known. The query starts normal with variance 1, projections normal with variance 1/fan_in.

    Parameters: query [H, K], k_proj, v_proj, out_proj [dim, dim].
    State: {"maximum": [B, H], -inf at the start, "normalizer": [B, H], "memory": [B, H, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Aaren(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H; each has K = dim / H features.
    """

    dim: int
    heads: int

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        return {
            "query": Param(
                (self.heads, self.dim // self.heads),
                ("heads", "head_dim"),
                "weight",
                _init.normal(1.0),
            ),
            "k_proj": inward,
            "v_proj": inward,
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.heads)
        return {
            "maximum": jnp.full(shape, -jnp.inf, dtype),
            "normalizer": jnp.zeros(shape, dtype),
            "memory": jnp.zeros((*shape, self.dim // self.heads), dtype),
        }

    def state_flops(self) -> int:
        return 4 * (self.dim + self.heads)  # decay 1, weight and add 2, quotient 1

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        k = split_heads(wide_dense(x, params["k_proj"]), self.heads)
        v = split_heads(dense(x, params["v_proj"]).astype(k.dtype), self.heads)
        query = params["query"].astype(k.dtype)
        scores = jnp.sum(k * query, axis=-1) * k.shape[-1] ** -0.5
        stable = stabilize(None, scores, state["maximum"], context)
        # The sums of a head are channels of one scan: the values, then the normalizer.
        values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        decay = jnp.broadcast_to(jnp.exp(stable.log_decay)[..., None], values.shape)
        before = jnp.concatenate([state["memory"], state["normalizer"][..., None]], axis=-1)
        sums, last = linear_scan(
            merge_heads(decay),
            merge_heads(values * stable.weight[..., None]),
            before.reshape(before.shape[0], -1),
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        sums, last = split_heads(sums, self.heads), last.reshape(before.shape)
        o = merge_heads(sums[..., :-1] / sums[..., -1:]).astype(x.dtype)
        return dense(o, params["out_proj"]), {
            "maximum": stable.last,
            "normalizer": last[..., -1],
            "memory": last[..., :-1],
        }
