"""Lightning attention of TransNormerLLM: linear attention with a fixed decay per head."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class LightningAttention(MatrixLayer):
    """Lightning attention (2307.14995, 2401.04658, 2405.17381), of TransNormerLLM and MiniMax-01.

        q_t, k_t, v_t = silu(x_t W_q), silu(x_t W_k), silu(x_t W_v)       per head
        S_t = exp(-s_h) S_{t-1} + k_t v_t^T                               [K, K] per head
        o_t = S_t^T q_t
        y_t = (rmsnorm(o_t) * sigmoid(x_t W_1 W_2)) W_o                   norm over all heads

    The slopes s_h shrink with depth. For head h = 0 .. H - 1 of block l of L in a `Backbone`,

        s_h = 2^(-8(h+1)/H) (1 - l / (L - 1) + 1e-5)      slopes="geometric", released models
        s_h = (8 h / H) (1 - l / L)                       slopes="linear", the paper's formula
        s_h = 2^(-8(h+1)/H) (1 - l / (L - 1 + 1e-5) + 1e-5)        slopes="minimax", MiniMax-01

    where the first line is ALiBi's series. For an H that is not a power of two it is that of the
    power below, and then every second slope of twice that power. Outside a backbone l = 0, L = 1.

    Departures: the paper's norm has no scale; here it has one, as in MiniMax-01. The rotary
    embedding of the first block is left out. Projections start normal with variance 1/fan_in.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], gate_down [dim, gate_rank], gate_up
    [gate_rank, H * K], norm [H * K], out_proj [H * K, dim]; with `gate_rank=0` gate_proj
    [dim, H * K] in place of gate_down and gate_up. State: {"memory": [B, H, K, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LightningAttention(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K; by default dim / heads.
      slopes: "geometric", "linear" or "minimax".
      gate_rank: rank of the gate's projection, 0 for a full matrix; by default K.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    slopes: Literal["geometric", "linear", "minimax"] = "geometric"
    gate_rank: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.one_of(self, "slopes", self.slopes, ("geometric", "linear", "minimax"))
        if self.gate_rank != 0:
            _checks.positive(self, gate_rank=self.rank)
        self._check_positive("norm_eps")

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def rank(self) -> int:
        """Rank of the gate's projection: `gate_rank`, by default K."""
        return self.key_dim if self.gate_rank is None else self.gate_rank

    def declare_params(self) -> Mapping[str, Param | Layer]:
        width = self.heads * self.key_dim
        gate: dict[str, Param | Layer] = {"gate_proj": self._inward(width)}
        return {
            **self._qkv(),
            **(self._low_rank("gate", self.rank, width) if self.rank else gate),
            "norm": self._wide_norm(),
            "out_proj": self._outward(),
        }

    def _log_decay(self, context: Context, dtype: jnp.dtype) -> jax.Array:
        """Return -s_h [H] of the block."""
        block, depth = jnp.asarray(context.block, dtype), context.depth
        if self.slopes == "linear":
            heads = 8 * np.arange(self.heads) / self.heads
            return -jnp.asarray(heads, dtype) * (1 - block / depth)
        if self.slopes == "minimax":
            series = 2.0 ** (-8 * np.arange(1, self.heads + 1) / self.heads)
            return -jnp.asarray(series, dtype) * (1 - block / (depth - 1 + 1e-5) + 1e-5)
        return -jnp.asarray(alibi_slopes(self.heads), dtype) * (
            1 - block / max(depth - 1, 1) + 1e-5
        )

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        q, k, v, new_state = self._project(params, x, state, context)
        log_decay = self._log_decay(context, state_dtype(x.dtype))
        o, new_state["memory"] = linear_attention(
            jax.nn.silu(q),
            jax.nn.silu(k),
            jax.nn.silu(v),
            jnp.broadcast_to(log_decay, (*x.shape[:2], self.heads)),
            state["memory"],
            scale=1.0,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = rms_normalize(merge_heads(o), params["norm"], self.norm_eps)
        if self.rank:
            gate = dense(dense(x, params["gate_down"]), params["gate_up"])
        else:
            gate = dense(x, params["gate_proj"])
        return dense(o * jax.nn.sigmoid(gate), params["out_proj"]), new_state


def alibi_slopes(heads: int) -> list[float]:
    """Return the slopes of ALiBi (arXiv 2108.12409) for any number of heads."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]
