"""RWKV4: a weighted mean of values with an exponential weight per channel, and a fixed decay."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init, _rwkv
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._exponential import stabilize
from seqjax.layers._math import dense, wide_dense
from seqjax.layers.context import Context
from seqjax.layers.token_shift import initial_shift, shift
from seqjax.ops.elementwise.linear_scan import linear_scan
from seqjax.ops.previous import previous


@dataclasses.dataclass(frozen=True)
class RWKV4(Layer):
    """Time mixing of RWKV-4 (arXiv 2305.13048).

        x^c_t = x_t + (x_{t-1} - x_t) x_c                                   c in k, v, r
        k_t, v_t, r_t = x^k_t W_k, x^v_t W_v, x^r_t W_r
        wkv_t = (a_{t-1} + exp(u + k_t) v_t) / (b_{t-1} + exp(u + k_t))     per channel
        a_t = exp(w) a_{t-1} + exp(k_t) v_t,   b_t = exp(w) b_{t-1} + exp(k_t),   w = -exp(omega)
        y_t = (sigmoid(r_t) * wkv_t) W_o

    Where `reset` is true, x_{t-1}, a_{t-1} and b_{t-1} are zero. The state holds the sums times
    exp(-m_t) with m_t = max(m_{t-1} + w, k_t), so that keys of any size are safe. The initial
    values of the shares, of omega and of u depend on the place of the block in the model: pass
    `layer` and `depth`.

    Departures: weights start normal with variance 1/fan_in, or with `zero_init` as in the authors'
    code, W_k, W_r and W_o at 0 and W_v orthogonal. `RWKVChannelMix(version=4)` is the other half of
    a block.

    Parameters: x_k, x_v, x_r [dim], key_proj, value_proj, receptance_proj, out_proj [dim, dim],
    omega, bonus (u) [dim].
    State: {"shift": [B, 1, dim], "sums": a and b [B, 2 dim], "maximum": m [B, dim], -inf at the
    start}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RWKV4(dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["sums"].shape
      ((2, 5, 8), (2, 8), (2, 16))

    Attributes:
      dim: features of input and output.
      layer: index of the block in the model, for the initial values.
      depth: number of blocks of the model, for the initial values.
      zero_init: whether W_k, W_r and W_o start at 0.
      present_share: whether the shares x_c are those of the present input, as in checkpoints of
        RWKV-4: x^c_t = x_{t-1} + (x_t - x_{t-1}) x_c.
    """

    dim: int
    layer: int = 0
    depth: int = 1
    zero_init: bool = False
    present_share: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _rwkv.check_layer_index(self)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim = self.dim
        rise, fall = _rwkv.depth_ratios(self)

        def square(start: Any, *axes: str) -> Param:
            return Param((dim, dim), axes or ("embed", "heads"), "weight", start)

        share = functools.partial(_rwkv.declare_share, dim, present=self.present_share)
        zero = _init.zeros if self.zero_init else _init.fan_in_normal
        values = jax.nn.initializers.orthogonal() if self.zero_init else _init.fan_in_normal
        omega = _rwkv.per_channel(lambda i: -5 + 8 * (i / max(dim - 1, 1)) ** (0.7 + 1.3 * rise))
        bonus = _rwkv.per_channel(lambda i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
        return {
            "x_k": share(fall),
            "x_v": share(fall, 0.3 * rise),
            "x_r": share(0.5 * fall),
            "key_proj": square(zero),
            "value_proj": square(values),
            "receptance_proj": square(zero),
            "omega": Param((dim,), ("heads",), "recurrence", omega),
            "bonus": Param((dim,), ("heads",), "recurrence", bonus),
            "out_proj": square(zero, "heads", "embed"),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "shift": initial_shift(batch_size, self.dim, dtype),
            "sums": jnp.zeros((batch_size, 2 * self.dim), dtype),
            "maximum": jnp.full((batch_size, self.dim), -jnp.inf, dtype),
        }

    def state_flops(self) -> int:
        return 10 * self.dim  # two decays and writes of 2, two reads of 2, the quotient, the gate

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        earlier, last_input = shift(x, state["shift"], context)
        mixed = {c: _rwkv.mix(x, earlier, params[f"x_{c}"], self.present_share) for c in "kvr"}
        k = wide_dense(mixed["k"], params["key_proj"])
        v = dense(mixed["v"], params["value_proj"]).astype(k.dtype)
        log_decay = -jnp.exp(params["omega"].astype(k.dtype))
        stable = stabilize(log_decay, k, state["maximum"], context)
        decay = jnp.exp(stable.log_decay)
        sums, last = linear_scan(
            jnp.concatenate([decay, decay], axis=-1),
            jnp.concatenate([stable.weight * v, stable.weight], axis=-1),
            state["sums"],
            reset=reset,
            sequence_axis=sequence_axis,
        )
        before, _ = previous(sums, state["sums"], reset, sequence_axis)
        # The read weighs the present input by exp(u + k), which may exceed exp(m_t).
        now = params["bonus"].astype(k.dtype) + k
        top = jax.lax.stop_gradient(jnp.maximum(stable.before, now))
        old, new = jnp.exp(stable.before - top), jnp.exp(now - top)
        a, b = jnp.split(before, 2, axis=-1)
        wkv = ((old * a + new * v) / (old * b + new)).astype(x.dtype)
        r = jax.nn.sigmoid(dense(mixed["r"], params["receptance_proj"]))
        new_state = {"shift": last_input, "sums": last, "maximum": stable.last}
        return dense(r * wkv, params["out_proj"]), new_state
