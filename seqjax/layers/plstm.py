"""pLSTM on sequences: linear attention with source, transition and mark gates."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers._reductions import last_step, signs
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class PLSTM(MatrixLayer):
    """Parallelizable linear source transition mark network, pLSTM (arXiv 2506.11997), in 1-D.

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                         per head
        s_t, m_t, d_t = sigmoid(x_t W_s + b_s), sigmoid(x_t W_m + b_m), sigmoid(x_t W_d + b_d)
        a_t = tanh(5 (x_t W_a + b_a))                                     in (-1, 1), per head
        S_t = a_t S_{t-1} + s_t k_t v_t^T                                 [K, V] per head
        o_t = (m_t S_{t-1}^T q_t + d_t (q_t . k_t) v_t) / sqrt(K)
        y_t = rmsnorm(o_t) W_o

    The source s writes to the state, the mark m reads the state before the step, and the direct
    gate d reads the present input. The transition a may be negative. W_s, W_m, W_d and W_a start at
    0, b_s, b_m, b_d at -5 and b_a at 1. The RMS norm is per head, with one scale [V] for all heads.

    The derivative of log |a_t| is not finite where a_t is exactly 0.

    Departures: transitions are numbers (J = 1 in the paper), on sequences only. Other projections
    start normal with variance 1/fan_in.

    Parameters: q_proj, k_proj, v_proj [dim, H * K]; source_proj, mark_proj, direct_proj,
    transition_proj [dim, H]; source_bias, mark_bias, direct_bias, transition_bias [H]; norm [K];
    out_proj [H * K, dim]. State: {"memory": [B, H, K, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = PLSTM(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K = V; by default dim / heads.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_positive("norm_eps")

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params = self._qkv()
        for name, bias in _GATES.items():
            params[f"{name}_proj"] = self._inward(self.heads, initializer=_init.zeros)
            params[f"{name}_bias"] = Param(
                (self.heads,), ("heads",), "recurrence", jax.nn.initializers.constant(bias)
            )
        return params | {"norm": self._head_norm(), "out_proj": self._outward()}

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide, axis = state_dtype(x.dtype), context.sequence_axis
        q, k, v = (z.astype(wide) for z in self._project(params, x, state, context)[:3])

        def gate(name: str) -> jax.Array:
            bias = params[f"{name}_bias"].astype(wide)
            return dense(x, params[f"{name}_proj"]).astype(wide) + bias

        source, mark, direct = (
            jax.nn.sigmoid(gate(name))[..., None] for name in ("source", "mark", "direct")
        )
        transition = 5 * gate("transition")
        negative = transition < 0
        s = signs(negative, wide, axis)[..., None]
        s_before = jnp.where(negative[..., None], -s, s)  # without the sign of this step
        o, memory = linear_attention(
            s_before * q,
            s * source * k,
            v,
            _log_tanh(jnp.abs(transition)),
            state["memory"],
            scale=1.0,
            exclusive=True,
            reset=context.reset,
            sequence_axis=axis,
        )
        present = jnp.sum(q * k, axis=-1, keepdims=True) * v
        o = (mark * o + direct * present) * self.key_dim**-0.5
        y = merge_heads(rms_normalize(o, params["norm"], self.norm_eps)).astype(x.dtype)
        memory = last_step(s, axis)[..., None] * memory
        return dense(y, params["out_proj"]), {"memory": memory}


_GATES: dict[str, Any] = {"source": -5.0, "mark": -5.0, "direct": -5.0, "transition": 1.0}


def _log_tanh(x: jax.Array) -> jax.Array:
    """Return log(tanh(x)) for x >= 0, with all digits for large x."""
    return jnp.log(-jnp.expm1(-2 * x)) - jnp.log1p(jnp.exp(-2 * x))
