"""Attention: exact softmax attention over all earlier positions or the last few of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._attention import Rotary
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._cache import Cache
from seqjax.layers._math import dense, rms_normalize, split_heads
from seqjax.layers._window import Window
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Attention(Layer):
    """Causal softmax attention (arXiv 1706.03762) with grouped keys and values (2305.13245).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v       H heads of q; `kv_heads` heads of k and v
        q_t, k_t = rms(q_t) * g_q, rms(k_t) * g_k       with `qk_norm`
        p_ts = softmax_s(scale * <R_t q_t, R_s k_s>)    s <= t, no reset in (s, t]
        o_t = sum_s p_ts v_s
        y_t = (o_t * sigmoid(x_t W_g)) W_o              gate with `output_gate`

    With a `window`, s > t - window as well. Head h of q attends to head h // (H / kv_heads) of k
    and v. R_t rotates the features j and j + R/2 of the first R = `rotary_dim` features of a head
    by the angle t * rope_base^(-2j/R) (arXiv 2104.09864), with t counted from the last reset.

    Without a window the state has room for `capacity` positions of a document. A call with more
    positions and without resets raises ValueError. Outputs at later positions are NaN, in `apply`
    as in `step`. With a window the state holds the last window - 1 positions, and sequences may
    have any length.

    A position with a non-finite query, key or value turns every output that may attend to it into
    NaN. No other output or gradient changes. With `sequence_axis` full attention gathers the keys
    and values of all devices; with a window neighbors exchange the last positions.

    Departures: the scores of 1,024 queries at a time are in memory, with all keys.

    Parameters: q_proj [dim, H * K], k_proj, v_proj [dim, kv_heads * K], out_proj [H * K, dim]; with
    `bias` q_bias, k_bias, v_bias, with `out_bias` out_bias [dim]; with `qk_norm` q_norm, k_norm
    [K], or for all heads [H * K] and [kv_heads * K]; with `output_gate` gate_proj [dim, H * K], and
    with `bias` gate_bias.
    State: {"k", "v": [B, S, kv_heads, K], "valid": [B, S] bool}. Without a window S = `capacity`,
    with the oldest position first and keys after rotation. With one S = window - 1, with the newest
    position last and keys before rotation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Attention(dim=8, heads=4, kv_heads=2, capacity=16)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["k"].shape, state["valid"].sum(axis=1).tolist()
      ((2, 5, 8), (2, 8), (2, 16, 2, 2), [6, 6])

    Attributes:
      dim: features of input and output.
      heads: number of heads of q, H.
      kv_heads: number of heads of k and v, a divisor of H; by default H.
      head_dim: features per head K; by default dim / heads.
      window: number of positions that a query sees, including its own; by default all.
      capacity: number of positions of a document that the state has room for, without a window.
      cache_dtype: dtype of the keys and values in the state; by default float32, or float64 for
        inputs in float64. For inputs in the same dtype the outputs do not change.
      rotary_dim: number of rotated features R, even; by default all of a head, 0 for none.
      rope_base: base of the rotary frequencies.
      scale: factor of the scores; by default 1 / sqrt(K).
      qk_norm: RMS norms of q and k: 'rms' or 'rms_offset' (a scale of 1 + g) for each head,
        'rms_all_heads' for all heads together; None for no norms.
      norm_eps: constant added to the mean squares in these norms.
      output_gate: whether to multiply the output by a sigmoid gate.
      bias: whether the projections to q, k, v and the gate have biases.
      out_bias: whether the projection of the output has a bias.
      out_dim: features of the output, for use inside another layer; by default dim.
    """

    dim: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    capacity: int = 4096
    cache_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    rotary_dim: int | None = None
    rope_base: float = 10000.0
    scale: float | None = None
    qk_norm: Literal["rms", "rms_offset", "rms_all_heads"] | None = None
    norm_eps: float = 1e-6
    output_gate: bool = False
    bias: bool = False
    out_bias: bool = False
    out_dim: int | None = None

    def __post_init__(self) -> None:
        head_dim = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, kv_heads=self.groups, capacity=self.capacity)
        if self.window is not None:
            _checks.positive(self, window=self.window)
        if self.cache_dtype is not None:
            _checks.one_of(
                self, "cache_dtype", self.cache_dtype, ("bfloat16", "float16", "float32")
            )
        _checks.require(
            self,
            self.heads % self.groups == 0,
            f"`kv_heads` must divide heads={self.heads}, got {self.groups}.",
        )
        if self.rotary_dim is None:
            _checks.require(
                self,
                head_dim % 2 == 0,
                f"`head_dim` must be even for rotary positions, got {head_dim}; pass head_dim, or"
                " rotary_dim.",
            )
        else:
            _checks.require(
                self,
                0 <= self.rotary_dim <= head_dim and self.rotary_dim % 2 == 0,
                f"`rotary_dim` must be even and from 0 to head_dim={head_dim}, got"
                f" {self.rotary_dim}.",
            )
        _checks.require(self, self.rope_base > 1, f"`rope_base` must be > 1, got {self.rope_base}.")
        if self.qk_norm is not None:
            _checks.one_of(self, "qk_norm", self.qk_norm, ("rms", "rms_offset", "rms_all_heads"))
        _checks.above_zero(self, norm_eps=self.norm_eps)
        _checks.positive(self, out_dim=self.output_dim)

    @property
    def output_dim(self) -> int:
        """Features of the output: `out_dim`, by default dim."""
        return self.dim if self.out_dim is None else self.out_dim

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def groups(self) -> int:
        """Number of heads of k and v: `kv_heads`, by default `heads`."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _core(self) -> Cache | Window:
        rotary = Rotary(
            self.key_dim if self.rotary_dim is None else self.rotary_dim, self.rope_base
        )
        scale = self.key_dim**-0.5 if self.scale is None else self.scale
        if self.window is None:
            return Cache(self.capacity, rotary, scale)
        return Window(self.window, rotary, scale)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        kv_axis = "heads" if self.groups == self.heads else "kv_heads"
        widths = {
            "q": (self.heads * self.key_dim, "heads"),
            "k": (self.groups * self.key_dim, kv_axis),
            "v": (self.groups * self.key_dim, kv_axis),
        }
        if self.output_gate:
            widths["gate"] = widths["q"]
        params: dict[str, Param | Layer] = {
            f"{name}_proj": Param((self.dim, width), ("embed", axis), "weight", _init.fan_in_normal)
            for name, (width, axis) in widths.items()
        }
        params["out_proj"] = Param(
            (self.heads * self.key_dim, self.output_dim),
            ("heads", "embed"),
            "weight",
            _init.fan_in_normal,
        )
        if self.bias:
            for name, (width, axis) in widths.items():
                params[f"{name}_bias"] = Param((width,), (axis,), "bias", _init.zeros)
        if self.out_bias:
            params["out_bias"] = Param((self.output_dim,), ("embed",), "bias", _init.zeros)
        if self.qk_norm is not None:
            start = _init.zeros if self.qk_norm == "rms_offset" else _init.ones
            for name in ("q", "k"):
                width, axis = (
                    widths[name] if self.qk_norm == "rms_all_heads" else (self.key_dim, "head_dim")
                )
                params[f"{name}_norm"] = Param((width,), (axis,), "norm", start)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        length = self.capacity if self.window is None else self.window - 1
        shape = (batch_size, length, self.groups, self.key_dim)
        dtype = dtype if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "valid": jnp.zeros(shape[:2], jnp.bool_),
        }

    def state_flops(self) -> int:
        seen = self.capacity if self.window is None else self.window
        return 4 * seen * self.heads * self.key_dim  # scores and the weighted sum

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        length = x.shape[1]
        _checks.require(
            self,
            self.window is not None
            or context.reset is not None
            or not isinstance(length, int)
            or length <= self.capacity,
            f"`x` must have at most capacity={self.capacity} positions, got {length}; make the"
            " layer with a larger capacity.",
        )
        q, k, v = (
            split_heads(dense(x, params[f"{name}_proj"], params.get(f"{name}_bias")), heads)
            for name, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        )
        if self.qk_norm is not None:
            q, k = (self._normed(z, params[f"{name}_norm"]) for name, z in (("q", q), ("k", k)))
        q = q.reshape(*q.shape[:2], self.groups, self.heads // self.groups, self.key_dim)
        o, state = self._core.attend(q, k, v, state, context)
        o = o.reshape(*o.shape[:2], self.heads * self.key_dim)
        if self.output_gate:
            o = o * jax.nn.sigmoid(dense(x, params["gate_proj"], params.get("gate_bias")))
        return dense(o, params["out_proj"], params.get("out_bias")), state

    def _normed(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        scale = scale.astype(state_dtype(z.dtype))
        if self.qk_norm == "rms_all_heads":
            return rms_normalize(z.reshape(*z.shape[:2], -1), scale, self.norm_eps).reshape(z.shape)
        return rms_normalize(z, 1 + scale if self.qk_norm == "rms_offset" else scale, self.norm_eps)


@dataclasses.dataclass(frozen=True)
class SlidingWindowAttention(Layer):
    """Causal softmax attention over a window (arXiv 2004.05150) with rotary positions (2104.09864).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                              per head
        p_ts = softmax_s(<R_t q_t, R_s k_s> / sqrt(K)),   t - window < s <= t, no reset in (s, t]
        y_t = (sum_s p_ts v_s) W_o

    This is `Attention` with a window and without options. R_t rotates features j and j + K/2 by the
    angle t * rope_base^(-2j/K). Scores depend on t - s only. The state therefore holds keys before
    rotation, and positions are counted inside a block, which keeps angles small and exact for
    sequences of any length.

    Queries are processed in blocks of `window` against the keys that they can see, so memory grows
    as T * window. A position with a non-finite query, key or value turns every output that may
    attend to it into NaN. No other output or gradient changes.

    Departures: none of the dilated or global patterns of arXiv 2004.05150.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], out_proj [H * K, dim].
    State: {"k", "v": [B, window - 1, H, K], "valid": [B, window - 1] bool}, oldest first.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = SlidingWindowAttention(dim=8, heads=2, window=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["k"].shape
      ((2, 5, 8), (2, 8), (2, 3, 2, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      window: number of positions that a query sees, including its own.
      head_dim: features per head K, even; by default dim / heads.
      rope_base: base of the rotary frequencies.
    """

    dim: int
    heads: int
    window: int
    head_dim: int | None = None
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        head_dim = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, window=self.window)
        _checks.require(
            self,
            head_dim % 2 == 0,
            f"`head_dim` must be even for rotary positions, got {head_dim}; pass head_dim.",
        )
        _checks.require(self, self.rope_base > 1, f"`rope_base` must be > 1, got {self.rope_base}.")

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self._attention.key_dim

    @property
    def _attention(self) -> Attention:
        return Attention(
            self.dim,
            self.heads,
            head_dim=self.head_dim,
            window=self.window,
            rope_base=self.rope_base,
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return self._attention.declare_params()

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self._attention.make_state(batch_size, dtype)

    def state_flops(self) -> int:
        return self._attention.state_flops()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        return self._attention.forward(params, x, state, context)
