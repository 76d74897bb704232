"""GLA: gated linear attention, a matrix memory with a decay per key channel."""

import dataclasses
from collections.abc import Mapping

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class GLA(MatrixLayer):
    """Gated linear attention (arXiv 2312.06635).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                        per head
        g_t = log sigmoid(x_t W_1 W_2 + b) / tau                         per key channel
        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T                          [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = (rmsnorm(o_t) * silu(x_t W_g)) W_o

    The RMS norm is per head, with one scale [V] for all heads. The gate's projection has a low
    rank. With `conv_size`, a `ShortConv` with silu follows the projections of q, k and v, an option
    of the authors' code.

    Departures: projections start normal with variance 1/fan_in; the authors use Xavier uniform with
    a gain of 2^-2.5. The authors' code clamps the gate from below for its kernels; here it is not
    clamped.

    Parameters: q_proj, k_proj [dim, H * K], v_proj, gate_proj [dim, H * V], decay_down
    [dim, gate_rank], decay_up [gate_rank, H * K], decay_bias [H * K], norm [V], out_proj
    [H * V, dim]; with `conv_size` q_conv, k_conv, v_conv (`ShortConv`).
    State: {"memory": [B, H, K, V]}, with `conv_size` also {"q_conv", "k_conv", "v_conv"}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GLA(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 2, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      expand_k: key features of all heads per feature of the input: K = expand_k * dim / H.
      expand_v: value features of all heads per feature of the input: V = expand_v * dim / H.
      gate_rank: rank of the gate's projection.
      gate_temperature: tau; a larger value makes decays slower.
      conv_size: taps of the short convolutions; by default there are no convolutions.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_temperature: float = 16.0
    conv_size: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self._check_heads()
        _checks.positive(self, gate_rank=self.gate_rank)
        for name in ("expand_k", "expand_v"):
            self._check_width(name, getattr(self, name) * self.dim / self.heads)
        self._check_positive("gate_temperature", "norm_eps")

    @property
    def key_dim(self) -> int:
        """Key features per head K."""
        return round(self.expand_k * self.dim / self.heads)

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.dim / self.heads)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        return {
            **self._qkv(),
            **self._low_rank("decay", self.gate_rank, keys),
            "decay_bias": Param((keys,), ("heads",), "recurrence", _init.zeros),
            "norm": self._head_norm(),
            "gate_proj": self._inward(values),
            "out_proj": self._outward(),
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        q, k, v, new_state = self._project(params, x, state, context)
        gate = dense(dense(x, params["decay_down"]), params["decay_up"]).astype(wide)
        log_decay = jax.nn.log_sigmoid(gate + params["decay_bias"].astype(wide))
        o, new_state["memory"] = linear_attention(
            q,
            k,
            v,
            split_heads(log_decay / self.gate_temperature, self.heads),
            state["memory"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps))
        return dense(o * jax.nn.silu(dense(x, params["gate_proj"])), params["out_proj"]), new_state
