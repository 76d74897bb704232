"""Comba: a delta rule memory with feedback from the state before its decay."""

import dataclasses
from collections.abc import Mapping

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, l2_normalize, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer, decay_gate, decay_params
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.generalized_delta_rule import generalized_delta_rule


@dataclasses.dataclass(frozen=True)
class Comba(MatrixLayer):
    """Comba, a bilinear RNN with closed-loop control (arXiv 2506.02475).

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      per head
        s = sigmoid(decay)
        q, k = (q - D s k) / |q - D s k|, k / |k|                  |.|^2 = sum of squares + 1e-6
        beta_t = sigmoid(x_t W_beta)
        alpha_t = exp(-exp(A_log) softplus(x_t W_a + dt_bias))
        S_t = alpha_t S_{t-1} + beta_t k_t (v_t - s S_{t-1}^T k_t)^T           [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = (rmsnorm(o_t) * sigmoid(x_t W_g)) W_o

    The feedback reads S_{t-1} without the decay, as in the paper. The RMS norm is per head, with
    one scale [V] for all heads. A starts uniform in [1, 16], softplus of dt_bias log-uniform in
    [1e-3, 1e-1], `decay` at 1 and D at `correction`.

    Departures: projections start normal with variance 1/fan_in. The authors' default expand_v is 2.
    In flash-linear-attention the layer also normalizes s k, so that s has no effect on the state,
    and its reference reads the decayed state.

    Parameters: q_proj, k_proj [dim, H * K], v_proj, gate_proj [dim, H * V], q_conv, k_conv, v_conv
    (`ShortConv`), beta_proj, a_proj [dim, H], A_log, dt_bias, decay, D [H], norm [V], out_proj
    [H * V, dim].
    State: {"q_conv", "k_conv", "v_conv": [B, conv_size - 1, H * K or H * V],
    "memory": [B, H, K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Comba(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * K, which must be an integer.
      conv_size: taps of the short convolutions.
      correction: initial value of D; the authors use 0.02 for some small models.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: float = 1
    conv_size: int = 4
    correction: float = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_heads()
        self._check_width("expand_v", self.expand_v * self.key_dim)
        self._check_positive("norm_eps")

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.key_dim)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        start = jax.nn.initializers.constant(self.correction)
        return {
            **self._qkv(),
            "beta_proj": self._inward(self.heads),
            "a_proj": self._inward(self.heads),
            **decay_params(self.heads),
            "decay": Param((self.heads,), ("heads",), "recurrence", _init.ones),
            "D": Param((self.heads,), ("heads",), "recurrence", start),
            "norm": self._head_norm(),
            "gate_proj": self._inward(self.heads * self.value_dim),
            "out_proj": self._outward(),
        }

    def state_flops(self) -> int:
        heads, keys, values = self.memory_shape
        return 7 * heads * keys * values  # decay 1, read k 2, write 2, read q 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        q, k, v, new_state = self._project(params, x, state, context)
        q, k = q.astype(wide), k.astype(wide)
        feedback = jax.nn.sigmoid(params["decay"].astype(wide))[:, None]
        beta = jax.nn.sigmoid(dense(x, params["beta_proj"]).astype(wide))[..., None]
        q = l2_normalize(q - params["D"].astype(wide)[:, None] * feedback * k)
        k = l2_normalize(k)
        o, new_state["memory"] = generalized_delta_rule(
            q,
            beta * k,
            v,
            feedback * k,
            -beta * k,
            decay_gate(params)(dense(x, params["a_proj"])),
            state["memory"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps))
        gate = jax.nn.sigmoid(dense(x, params["gate_proj"]))
        return dense(o * gate, params["out_proj"]), new_state
