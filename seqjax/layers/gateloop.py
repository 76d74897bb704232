"""GateLoop: linear attention with a complex decay that depends on the input."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers._math import dense, merge_heads, split_heads
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class GateLoop(Layer):
    """Linear attention with a data-controlled complex decay, GateLoop (arXiv 2311.01927).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                         per head, real
        a_t = sigmoid(x_t W_m + b_m) * exp(i (x_t W_p + b_p))             per key channel
        S_t = diag(a_t) S_{t-1} + k_t v_t^T                               complex [K, V]
        o_t = Re(S_t^T q_t) / sqrt(K)
        y_t = (silu(x_t W_g) * o_t) W_o

    Departures: the paper has no 1/sqrt(K), which makes the scale of the output independent of the
    head size. The paper does not specify the biases of the decay. Here sigmoid(b_m) starts uniform
    in [min_decay, max_decay] and b_p uniform in [0, max_phase], which gives heads many time scales.

    Parameters: q_proj, k_proj, v_proj, gate_proj, magnitude_proj, phase_proj [dim, H * K],
    magnitude_bias, phase_bias [H * K], out_proj [H * K, dim]. State: S [B, H, K, K], complex64
    (complex128).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GateLoop(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K; by default dim / heads.
      min_decay: smallest |a| from the biases at initialization.
      max_decay: largest |a| from the biases at initialization.
      max_phase: largest phase from the biases at initialization.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    min_decay: float = 0.9
    max_decay: float = 0.999
    max_phase: float = math.pi / 10

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.require(
            self,
            0 < self.min_decay < self.max_decay < 1,
            "`min_decay` and `max_decay` must satisfy 0 < min_decay < max_decay < 1, got"
            f" {self.min_decay} and {self.max_decay}.",
        )
        _checks.above_zero(self, max_phase=self.max_phase)

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        width = self.heads * self.key_dim
        inward = Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)
        return {
            "q_proj": inward,
            "k_proj": inward,
            "v_proj": inward,
            "gate_proj": inward,
            "magnitude_proj": inward,
            "magnitude_bias": Param((width,), ("heads",), "recurrence", self._draw_magnitude),
            "phase_proj": inward,
            "phase_bias": Param(
                (width,), ("heads",), "recurrence", _init.uniform(0.0, self.max_phase)
            ),
            "out_proj": Param((width, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }

    def _draw_magnitude(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        decay = jax.random.uniform(key, shape, dtype, self.min_decay, self.max_decay)
        return jnp.log(decay) - jnp.log1p(-decay)

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros(
            (batch_size, self.heads, self.key_dim, self.key_dim),
            complex_dtype(dtype),
        )

    def state_flops(self) -> int:
        return 22 * self.heads * self.key_dim**2  # complex: decay 6, write 8, read 8

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        q, k, v = (
            split_heads(dense(x, params[name]), self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        magnitude, phase = (
            dense(x, params[f"{name}_proj"]).astype(wide) + params[f"{name}_bias"].astype(wide)
            for name in ("magnitude", "phase")
        )
        log_decay = jax.lax.complex(jax.nn.log_sigmoid(magnitude), phase)
        o, state = linear_attention(
            q,
            k,
            v,
            split_heads(log_decay, self.heads),
            state,
            reset=reset,
            sequence_axis=sequence_axis,
        )
        gate = jax.nn.silu(dense(x, params["gate_proj"]))
        return dense(gate * merge_heads(o.real).astype(x.dtype), params["out_proj"]), state
