"""Gated slot attention: softmax attention over a fixed number of slots that forget."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers._matrix import MatrixLayer
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class GSA(MatrixLayer):
    """Gated slot attention (arXiv 2409.07146), with M slots per head.

        q_t, k_t, v_t = silu(x_t W_q), silu(x_t W_k), silu(x_t W_v)       per head
        g_t = log sigmoid(x_t W_f) / tau,    s_t = 1 - exp(g_t)           [M] per head
        P_t = P_{t-1} diag(exp g_t) + k_t s_t^T                           keys of the slots [K, M]
        S_t = diag(exp g_t) S_{t-1} + s_t v_t^T                           their values [M, V]
        u_t = softmax(P_t^T q_t)                                          over the slots
        y_t = (rmsnorm(silu(S_t^T u_t)) * scale) W_o                      norm over all heads

    `linear_attention` runs twice: with decays of the values for P, and of the keys for S. With
    `conv_size`, a `ShortConv` with silu follows the projections of q, k and v in place of the silu.

    Departures: projections start normal with variance 1/fan_in; the authors use Xavier uniform with
    a gain of 2^-2.5.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], f_proj [dim, H * M], norm [H * K], out_proj
    [H * K, dim]; with `conv_size` q_conv, k_conv, v_conv (`ShortConv`). State: {"keys": P
    [B, H, K, M], "memory": S [B, H, M, K]}, with `conv_size` also {"q_conv", "k_conv", "v_conv"}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GSA(dim=8, heads=2, slots=3)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["keys"].shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 3), (2, 2, 3, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K = V; by default dim / heads.
      slots: number of slots M; by default K.
      gate_temperature: tau; a larger value makes decays slower.
      conv_size: taps of the short convolutions; by default there are no convolutions.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    slots: int | None = None
    gate_temperature: float = 8.0
    conv_size: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_heads()
        if self.slots is not None:
            _checks.positive(self, slots=self.slots)
        self._check_positive("gate_temperature", "norm_eps")

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def slot_count(self) -> int:
        """Number of slots M: `slots`, by default K."""
        return self.key_dim if self.slots is None else self.slots

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the values of the slots of one sequence: heads, slots, V."""
        return self.heads, self.slot_count, self.value_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {
            **self._qkv(),
            "f_proj": self._inward(self.heads * self.slot_count),
            "norm": self._wide_norm(),
            "out_proj": self._outward(),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.heads, self.key_dim, self.slot_count)
        return super().make_state(batch_size, dtype) | {"keys": jnp.zeros(shape, dtype)}

    def state_flops(self) -> int:
        heads, slots, values = self.memory_shape
        return 5 * heads * slots * (self.key_dim + values)  # decay 1, write 2, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        q, k, v, new_state = self._project(params, x, state, context)
        if self.conv_size is None:  # the convolutions have the same activation
            q, k, v = (jax.nn.silu(z) for z in (q, k, v))
        gate = split_heads(dense(x, params["f_proj"]).astype(wide), self.heads)
        log_decay = jax.nn.log_sigmoid(gate) / self.gate_temperature
        write = -jnp.expm1(log_decay)
        scores, new_state["keys"] = linear_attention(
            q,
            k,
            write,
            None,
            state["keys"],
            scale=1.0,
            value_log_decay=log_decay,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        slots = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        o, new_state["memory"] = linear_attention(
            slots,
            write.astype(v.dtype),
            v,
            log_decay,
            state["memory"],
            scale=1.0,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = rms_normalize(merge_heads(jax.nn.silu(o)), params["norm"], self.norm_eps)
        return dense(o, params["out_proj"]), new_state
