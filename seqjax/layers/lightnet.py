"""LightNet: linear attention whose decays and keys are a running softmax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads, wide_dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.log_scan import log_scan
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.previous import previous


@dataclasses.dataclass(frozen=True)
class LightNet(Layer):
    """Linear attention with additive decay, LightNet (arXiv 2405.21022).

        q_t, kappa_t, v_t = silu(x_t W_q), x_t W_k, x_t W_v                   per head
        z_t = log sum_{j <= t} exp(kappa_j)                                   per key channel
        S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(kappa_t - z_t) v_t^T     [K, V] per head
        y_t = (rmsnorm(S_t^T q_t / sqrt(K)) * silu(x_t W_1 W_2)) W_o

    So row c of S_t is the mean of the values so far, with softmax weights from channel c of kappa.
    The RMS norm runs over all heads. `log_scan` computes z.

    Departures: projections start normal with variance 1/fan_in, where the authors use Xavier
    uniform. The rotary encoding of the paper, LRPE, is left out, as in flash-linear-attention.

    Parameters: q_proj, k_proj, v_proj [dim, dim], gate_down [dim, gate_rank], gate_up
    [gate_rank, dim], norm [dim], out_proj [dim, dim].
    State: {"memory": [B, H, K, K], "normalizer": z [B, H, K], -inf at the start}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LightNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H; each has K = V = dim / H features. The authors use K = 128.
      gate_rank: rank of the output gate's projection.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    gate_rank: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, gate_rank=self.gate_rank)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        return {
            "q_proj": inward,
            "k_proj": inward,
            "v_proj": inward,
            "gate_down": Param(
                (self.dim, self.gate_rank), ("embed", None), "weight", _init.fan_in_normal
            ),
            "gate_up": Param(
                (self.gate_rank, self.dim), (None, "heads"), "weight", _init.fan_in_normal
            ),
            "norm": Param((self.dim,), ("heads",), "norm", _init.ones),
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        size = self.dim // self.heads
        return {
            "memory": jnp.zeros((batch_size, self.heads, size, size), dtype),
            "normalizer": jnp.full((batch_size, self.heads, size), -jnp.inf, dtype),
        }

    def state_flops(self) -> int:
        return 5 * self.dim * self.dim // self.heads  # decay 1, write 2, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        kappa = wide_dense(x, params["k_proj"])
        start = state["normalizer"].reshape(x.shape[0], -1)
        z, last = log_scan(None, kappa, start, reset=reset, sequence_axis=sequence_axis)
        before, _ = previous(z, start, reset, sequence_axis, fill=-jnp.inf)
        o, memory = linear_attention(
            split_heads(jax.nn.silu(dense(x, params["q_proj"])), self.heads),
            split_heads(jnp.exp(kappa - z), self.heads),
            split_heads(dense(x, params["v_proj"]), self.heads),
            split_heads(before - z, self.heads),
            state["memory"],
            reset=reset,
            sequence_axis=sequence_axis,
        )
        o = rms_normalize(merge_heads(o), params["norm"], self.norm_eps)
        gate = jax.nn.silu(dense(dense(x, params["gate_down"]), params["gate_up"]))
        new_state = {"memory": memory, "normalizer": last.reshape(state["normalizer"].shape)}
        return dense(o * gate, params["out_proj"]), new_state
