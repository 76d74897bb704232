"""Log-linear attention: one memory for each power of two of the distance to the past."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, l2_normalize, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv, qkv_convs
from seqjax.ops.matrix_state.generalized_delta_rule import generalized_delta_rule
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.monoid_scan import monoid_scan

RULES = ("decay", "delta")
MAX_LEVELS = 24  # float32 counts exactly up to 2^24 steps


@dataclasses.dataclass(frozen=True)
class LogLinearAttention(Layer):
    """Log-linear attention (arXiv 2506.04761), with a decay or with the gated delta rule.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))             per head
        A_t = alpha_t I                                                 rule="decay"
        A_t = alpha_t (I - beta_t k_t k_t^T)                            rule="delta", |q| = |k| = 1
        o_t = sum_{j <= t} lambda_t^(level(t, j)) q_t^T A_t ... A_{j+1} w_j v_j^T / sqrt(K)
        y_t = (rmsnorm(o_t) * silu(x_t W_g)) W_o

    with w_j = k_j dt_j for "decay" and k_j beta_j for "delta", and

        alpha_t = exp(-exp(A_log) dt_t),   dt_t = softplus(x_t W_dt + dt_bias),   beta = sigmoid
        lambda_t = softplus(L * (x_t W_lambda))                          [levels] per head
        level(t, j) = number of bits of (p_t xor p_j)                    p: steps since the reset

    Level 0 is the present step, level l >= 1 the other half of the block of 2^l steps around t. So
    recent steps have fine levels and distant steps coarse ones. Every level is one run of
    `linear_attention` or `generalized_delta_rule`: it writes in the first half of each block, reads
    in the second half, and starts anew with the next block. The cost is `levels` times that of one
    memory. Steps before the block of 2^(levels - 1) are forgotten.

    Departures: the authors merge the memories of smaller blocks into larger ones; here every level
    keeps its own memory, which gives the same values. The authors build on whole Mamba-2 and Gated
    DeltaNet blocks. Here "decay" has q, k and v per head, without Mamba-2's shared keys and skip
    connection. Projections start normal with variance 1/fan_in.

    Initialization: L one. exp(A_log) from 1 to H over the heads, and softplus of dt_bias
    log-uniform in [1e-3, 1e-1].

    Parameters: q_proj, k_proj [dim, H * K], v_proj, gate_proj [dim, H * V], q_conv, k_conv, v_conv
    (`ShortConv`), dt_proj [dim, H], A_log, dt_bias [H], level_proj [dim, H * levels], level_scale
    (L) [H, levels], norm [V], out_proj [H * V, dim]; for "delta" also beta_proj [dim, H].
    State: {"q_conv", "k_conv", "v_conv", "memory": [B, levels - 1, H, K, V], "steps": [B], the
    number of steps since the reset modulo 2^(levels - 1)}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LogLinearAttention(dim=8, heads=2, levels=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 3, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * K.
      levels: number of levels, from 2 to 24. 15 reach over 16,384 steps.
      rule: "decay" or "delta".
      conv_size: taps of the short convolutions.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: int = 1
    levels: int = 15
    rule: Literal["decay", "delta"] = "decay"
    conv_size: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, expand_v=self.expand_v, conv_size=self.conv_size)
        _checks.one_of(self, "rule", self.rule, RULES)
        _checks.require(
            self,
            isinstance(self.levels, int) and 2 <= self.levels <= MAX_LEVELS,
            f"`levels` must satisfy 2 <= levels <= {MAX_LEVELS}, got {self.levels}.",
        )

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return self.expand_v * self.key_dim

    def _convs(self) -> dict[str, ShortConv]:
        return qkv_convs(self.heads, self.key_dim, self.value_dim, self.conv_size)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        def inward(width: int) -> Param:
            return Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)

        heads = self.heads
        keys, values = heads * self.key_dim, heads * self.value_dim
        dt_bias = _init.inverse_softplus_log_uniform(1e-3, 1e-1)
        params: dict[str, Param | Layer] = {
            "q_proj": inward(keys),
            "k_proj": inward(keys),
            "v_proj": inward(values),
            "gate_proj": inward(values),
            **self._convs(),
            "dt_proj": inward(heads),
            "A_log": Param((heads,), ("heads",), "recurrence", _log_of_index),
            "dt_bias": Param((heads,), ("heads",), "recurrence", dt_bias),
            "level_proj": inward(heads * self.levels),
            "level_scale": Param((heads, self.levels), ("heads", None), "recurrence", _init.ones),
            "norm": Param((self.value_dim,), ("head_dim",), "norm", _init.ones),
            "out_proj": Param(
                (values, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }
        return params | ({"beta_proj": inward(heads)} if self.rule == "delta" else {})

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        shape = (batch_size, self.levels - 1, self.heads, self.key_dim, self.value_dim)
        return state | {"memory": jnp.zeros(shape, dtype), "steps": jnp.zeros(batch_size, dtype)}

    def state_flops(self) -> int:
        size = self.heads * self.key_dim * self.value_dim
        return (5 if self.rule == "decay" else 9) * (self.levels - 1) * size

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        new_state, mixed = {}, []
        for name, conv in self._convs().items():
            y = dense(x, params[f"{name[0]}_proj"])
            y, new_state[name] = conv.forward(params[name], y, state[name], context)
            mixed.append(split_heads(y.astype(wide), self.heads))
        q, k, v = mixed
        if self.rule == "delta":
            q, k = l2_normalize(q), l2_normalize(k)
        q = q * self.key_dim**-0.5
        dt = dense(x, params["dt_proj"]).astype(wide) + params["dt_bias"].astype(wide)
        dt = jax.nn.softplus(dt)
        log_decay = -jnp.exp(params["A_log"].astype(wide)) * dt
        rate = dt
        if self.rule == "delta":
            rate = jax.nn.sigmoid(dense(x, params["beta_proj"]).astype(wide))
        written = k * rate[..., None]
        level = split_heads(dense(x, params["level_proj"]).astype(wide), self.heads)
        weight = jax.nn.softplus(params["level_scale"].astype(wide) * level)
        position, new_state["steps"] = self._positions(state["steps"], x.shape[:2], context)

        def run(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            bit, weight, memory = inputs
            second = (position & bit)[..., None] != 0  # the second half of a block of 2 bit steps
            begins = position & (2 * bit - 1) == 0
            begins = begins if context.reset is None else begins | context.reset
            reads = jnp.where(second, weight, 0)[..., None] * q
            writes = jnp.where(second[..., None], 0, written)
            arrays = {"q": reads, "k": writes, "v": v, "log_decay": log_decay}
            if self.rule == "delta":
                arrays |= {"a": jnp.exp(log_decay)[..., None] * k, "b": -written}
            op = linear_attention if self.rule == "decay" else generalized_delta_rule
            o, memory = op(
                **arrays,
                initial_state=memory,
                scale=1.0,
                reset=begins,
                sequence_axis=context.sequence_axis,
            )
            return total + o, memory

        # Level 0 needs no memory. The scan keeps temporaries of one level at a time.
        bits = jnp.left_shift(1, jnp.arange(self.levels - 1, dtype=jnp.int32))
        by_level = jnp.moveaxis(weight, -1, 0)
        local = by_level[0][..., None] * jnp.sum(q * written, axis=-1, keepdims=True) * v
        memory = jnp.moveaxis(state["memory"], 1, 0)
        o, memory = jax.lax.scan(
            jax.checkpoint(run, prevent_cse=False), local, (bits, by_level[1:], memory)
        )
        new_state["memory"] = jnp.moveaxis(memory, 0, 1)
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps)).astype(x.dtype)
        return dense(o * jax.nn.silu(dense(x, params["gate_proj"])), params["out_proj"]), new_state

    def _positions(
        self, steps: jax.Array, shape: tuple[int, ...], context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Return the steps [B, T] since the last reset, and their number for the state."""
        count, last = monoid_scan(
            jnp.add,
            jnp.ones(shape, jnp.int32),
            steps.astype(jnp.int32),
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return count - 1, (last % 2 ** (self.levels - 1)).astype(steps.dtype)


def _log_of_index(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return log(1), ..., log(H)."""
    del key
    return jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))
