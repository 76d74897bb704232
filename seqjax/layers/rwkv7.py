"""RWKV-7: a matrix memory with decays per key channel and a generalized delta rule."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init, _rwkv
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, layer_normalize, merge_heads, split_heads
from seqjax.layers.context import Context
from seqjax.layers.token_shift import initial_shift, shift
from seqjax.ops.matrix_state.generalized_delta_rule import generalized_delta_rule

_VALUES, _WRITTEN = "rwkv7_values", "rwkv7_written"


@dataclasses.dataclass(frozen=True)
class RWKV7(Layer):
    """Time mixing of RWKV-7 (arXiv 2503.14456).

        x^c_t = x_t + (x_{t-1} - x_t) x_c                       c in r, w, k, v, a, g
        r_t, k'_t, v'_t = x^r_t W_r, x^k_t W_k, x^v_t W_v
        log w_t = -exp(-1/2) sigmoid(w0 + tanh(x^w_t w1) w2)    per key channel
        a_t = sigmoid(a0 + x^a_t a1 a2)
        v_t = v'_t + (v'^1_t - v'_t) sigmoid(v0 + x^v_t v1 v2)
        c_t = k'_t k_k,  divided per head by max(|c_t|, 1e-12)
        k_t = k'_t (1 + (a_t - 1) k_a)
        S_t = diag(w_t) S_{t-1} - (c_t a_t) (c_t^T S_{t-1}) + k_t v_t^T        [K, K] per head
        o_t = layernorm(S_t^T r_t) + (sum over the head of r_t k_t r_k) v_t
        y_t = (o_t * sigmoid(x^g_t g1) g2) W_o

    v'^1 is v' of the first RWKV-7 layer of the `Backbone`, which blocks pass on as a shared value.
    That layer, and a layer outside a backbone, uses v_t = v'_t; v0, v1 and v2 have no effect there.
    The layer norm is per head, with scale and bias per channel and eps = `norm_eps` * K.

    Initial values are those of the authors' code. Some depend on the place of the block in the
    model: pass `layer` and `depth`, with a list of layers for the backbone. W_o starts normal with
    variance 1 / fan_in, or at 0 with `zero_init`, as in the authors' code.

    Parameters: r_proj, k_proj, v_proj, out_proj [dim, dim], norm_scale, norm_bias [dim], and under
    the names of the authors' files x_r, x_w, x_k, x_v, x_a, x_g, w0, a0, v0, k_k, k_a [dim],
    w1 [dim, decay_rank], w2 [decay_rank, dim], a1, a2, v1, v2, g1, g2 of the same form, r_k [H, K].
    State: {"shift": [B, 1, dim], "memory": [B, H, K, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RWKV7(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H, of K = dim / H features; published models have K = 64.
      decay_rank: rank of w1 w2; by default 2.5 sqrt(dim), rounded to a multiple of 32, at least 32.
      a_rank: rank of a1 a2; by default that of `decay_rank`.
      value_rank: rank of v1 v2; by default 1.7 sqrt(dim), rounded in the same way.
      gate_rank: rank of g1 g2; by default 5 sqrt(dim), rounded in the same way.
      layer: index of the block in the model, for the initial values.
      depth: number of blocks of the model, for the initial values.
      value_residual: whether values of the first layer are mixed in.
      zero_init: whether W_o starts at 0.
      norm_eps: eps of the layer norm, per feature of a head.
    """

    dim: int
    heads: int
    decay_rank: int | None = None
    a_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    layer: int = 0
    depth: int = 1
    value_residual: bool = True
    zero_init: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        ranks = ("decay_rank", "a_rank", "value_rank", "gate_rank")
        given = {name: getattr(self, name) for name in ranks}
        _checks.positive(self, **{k: rank for k, rank in given.items() if rank is not None})
        _rwkv.check_layer_index(self)

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the low-rank maps by the letter of their parameters."""
        given = {"w": self.decay_rank, "a": self.a_rank, "v": self.value_rank, "g": self.gate_rank}
        factors = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
        root = self.dim**0.5
        return {
            name: max(32, 32 * round(factors[name] * root / 32)) if rank is None else rank
            for name, rank in given.items()
            if name != "v" or self.value_residual
        }

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, size = self.dim, self.head_dim
        first_to_last, last_to_first = _rwkv.depth_ratios(self)
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}

        def square(scale: float) -> Param:
            start = _init.uniform(-scale * dim**-0.5, scale * dim**-0.5)
            return Param((dim, dim), ("embed", "heads"), "weight", start)

        def channels(start: Any, role: Any = "recurrence") -> Param:
            return Param((dim,), ("heads",), role, start)

        def ramp(i: jax.Array) -> jax.Array:
            return i / max(dim - 1, 1)

        def zigzag(i: jax.Array) -> jax.Array:
            z = 2 * (i % size) / max(size - 1, 1) - 1
            return z * jnp.abs(z)

        def decay(i: jax.Array) -> jax.Array:
            return -5.5 + 6 * ramp(i) ** (1 + first_to_last**0.3) + 2.5 * zigzag(i)

        def rate(i: jax.Array) -> jax.Array:
            return -0.19 + 0.3 * zigzag(i) + 0.4 * (ramp(i) - 0.5)

        biases = {
            "w": channels(_rwkv.per_channel(decay)),
            "a": channels(_rwkv.per_channel(rate)),
            "v": channels(_rwkv.per_channel(lambda i: 0.73 - 0.4 * (ramp(i) - 0.5)), "bias"),
        }
        params: dict[str, Param | Layer] = {
            f"x_{name}": _rwkv.declare_share(dim, power * last_to_first)
            for name, power in powers.items()
        }
        for name, rank in self.ranks.items():
            if name in biases:
                params[f"{name}0"] = biases[name]
            params[f"{name}1"] = Param((dim, rank), ("embed", None), "weight", _init.zeros)
            params[f"{name}2"] = Param((rank, dim), (None, "heads"), "weight", _rwkv.low_rank_start)
        scale = ((self.layer + 1) / self.depth) ** 0.7
        return params | {
            "k_k": channels(_rwkv.per_channel(lambda i: 0.71 - 0.1 * (ramp(i) - 0.5))),
            "k_a": channels(jax.nn.initializers.constant(1.02)),
            "r_k": Param(
                (self.heads, size), ("heads", None), "bias", jax.nn.initializers.constant(-0.04)
            ),
            "r_proj": square(0.5),
            "k_proj": square(0.05),
            "v_proj": square(0.5),
            "norm_scale": channels(jax.nn.initializers.constant(scale), "norm"),
            "norm_bias": channels(_init.zeros, "norm"),
            "out_proj": Param(
                (dim, dim),
                ("heads", "embed"),
                "weight",
                _init.zeros if self.zero_init else _init.fan_in_normal,
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.heads, self.head_dim, self.head_dim)
        return {
            "shift": initial_shift(batch_size, self.dim, dtype),
            "memory": jnp.zeros(shape, dtype),
        }

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        if not self.value_residual:
            return {}
        return {
            _VALUES: jnp.zeros((batch_size, length, self.dim), dtype),
            _WRITTEN: jnp.zeros((batch_size, length), jnp.bool_),
        }

    def state_flops(self) -> int:
        return 9 * self.heads * self.head_dim**2  # decay 1, read 2, two writes 4, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        previous, last = shift(x, state["shift"], context)
        x_r, x_w, x_k, x_v, x_a, x_g = (
            _rwkv.mix(x, previous, params[f"x_{name}"]) for name in "rwkvag"
        )
        heads = functools.partial(split_heads, heads=self.heads)

        def per_channel(name: str) -> jax.Array:
            return params[name].astype(wide)

        def low_rank(x: jax.Array, name: str) -> jax.Array:
            return dense(dense(x, params[f"{name}1"]), params[f"{name}2"]).astype(wide)

        decay = dense(jnp.tanh(dense(x_w, params["w1"])), params["w2"]).astype(wide)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(per_channel("w0") + decay)
        rate = jax.nn.sigmoid(per_channel("a0") + low_rank(x_a, "a"))
        gate = dense(jax.nn.sigmoid(dense(x_g, params["g1"])), params["g2"])
        r, v = dense(x_r, params["r_proj"]), dense(x_v, params["v_proj"])
        if _VALUES in context.values:
            share = jax.nn.sigmoid(per_channel("v0") + low_rank(x_v, "v"))
            v = _mix_first_values(v, share, context.values)
        k = dense(x_k, params["k_proj"]).astype(wide)
        erased = _unit(heads(k * per_channel("k_k")))
        k = heads(k * (1 + (rate - 1) * per_channel("k_a")))
        r, v = heads(r), heads(v)
        o, memory = generalized_delta_rule(
            r,
            k,
            v,
            -erased,
            erased * heads(rate),
            heads(log_decay),
            state["memory"],
            scale=1.0,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        scale, bias = (heads(params[f"norm_{name}"]) for name in ("scale", "bias"))
        o = layer_normalize(o.astype(wide), scale, bias, self.norm_eps * self.head_dim)
        bonus = jnp.sum(r.astype(wide) * k * per_channel("r_k"), axis=-1, keepdims=True)
        o = merge_heads(o + bonus * v.astype(wide)) * gate.astype(wide)
        return dense(o.astype(x.dtype), params["out_proj"]), {"shift": last, "memory": memory}


def _mix_first_values(v: jax.Array, share: jax.Array, shared: dict[str, jax.Array]) -> jax.Array:
    """Return v + (first - v) * share; the first layer writes its `v` to `shared` instead."""
    written = shared[_WRITTEN][..., None]
    first = jnp.where(written, shared[_VALUES], v)
    shared[_VALUES], shared[_WRITTEN] = first, shared[_WRITTEN] | True
    return jnp.where(written, v + (first - v) * share.astype(v.dtype), v)


def _unit(x: jax.Array, floor: float = 1e-12) -> jax.Array:
    """Return x / max(|x|, floor) over the last axis; the derivative is finite at x = 0."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, floor**2))
