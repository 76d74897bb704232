"""MLA: multi-head latent attention, whose cache holds one small vector a position."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._attention import Rotary
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._cache import Cache
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class MLA(Layer):
    """Causal multi-head latent attention of DeepSeek-V2 (arXiv 2405.04434).

        c_t = rms(x_t W_c) * g_c                             [kv_rank], the latent
        r_t = R_t x_t W_r                                    [rotary_dim], for all heads
        k_t^h, v_t^h = [c_t W_k^h, r_t], c_t W_v^h           [head_dim + rotary_dim], [value_dim]
        q_t^h = [n_t^h, R_t s_t^h],   [n_t, s_t] = x_t W_q   or (rms(x_t W_a) * g_a) W_q
        p_ts = softmax_s(scale * <q_t^h, k_s^h>)             s <= t, no reset in (s, t]
        y_t = (sum_s p_ts v_s^h)_h W_o

    R_t rotates the features 2j and 2j + 1 of `rotary_dim` features by the angle
    t * rope_base^(-2j / rotary_dim), with t counted from the last reset. With rope_base=None there
    is no rotation, as in Kimi Linear (arXiv 2510.26692). The state holds c and r only.

    The state has room for `capacity` positions of a document. A call with more positions and
    without resets raises ValueError. Outputs at later positions are NaN. Non-finite inputs and
    `sequence_axis` are as in `Attention`.

    Departures: a call of one position compares queries with latents, <n W_k^T, c>, and never forms
    k and v. A longer call forms them, because the comparison of latents has more operations.

    Parameters: q_proj [dim, H * (head_dim + rotary_dim)], by head; kv_down [dim, kv_rank], kv_norm
    [kv_rank], k_rope [dim, rotary_dim], k_up [kv_rank, H * head_dim], v_up [kv_rank,
    H * value_dim], out_proj [H * value_dim, dim]. With q_rank q_down [dim, q_rank], q_norm
    [q_rank], and q_up [q_rank, ...] in place of q_proj. With `bias` kv_down_bias, k_rope_bias,
    out_bias and, with q_rank, q_down_bias. With rotary_dim=0 there is no k_rope.
    State: {"latent": [B, capacity, rotary_dim + kv_rank], r before c, "valid": [B, capacity] bool}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MLA(dim=8, heads=2, kv_rank=4, head_dim=4, rotary_dim=2, capacity=16)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["latent"].shape
      ((2, 5, 8), (2, 8), (2, 16, 6))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      kv_rank: features of the latent.
      head_dim: features of a head's queries and keys that come from the latent.
      rotary_dim: features of a head's queries and keys that all heads share; 0 for none.
      value_dim: features of a head's values; by default head_dim.
      q_rank: rank of the projection to the queries; by default it is a full matrix.
      capacity: number of positions of a document that the state has room for.
      cache_dtype: dtype of the latents in the state; by default float32, or float64 for inputs in
        float64. For inputs in the same dtype the outputs do not change.
      rope_base: base of the rotary frequencies; None for no rotation.
      scale: factor of the scores; by default 1 / sqrt(head_dim + rotary_dim).
      norm_eps: constant added to the mean squares of the latents.
      bias: whether the projections of the input and the output, except q_proj, have biases.
    """

    dim: int
    heads: int
    kv_rank: int
    head_dim: int
    rotary_dim: int = 0
    value_dim: int | None = None
    q_rank: int | None = None
    capacity: int = 4096
    cache_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    rope_base: float | None = 10000.0
    scale: float | None = None
    norm_eps: float = 1e-6
    bias: bool = False

    def __post_init__(self) -> None:
        _checks.positive(
            self,
            dim=self.dim,
            heads=self.heads,
            kv_rank=self.kv_rank,
            head_dim=self.head_dim,
            value_dim=self.values,
            capacity=self.capacity,
        )
        if self.q_rank is not None:
            _checks.positive(self, q_rank=self.q_rank)
        if self.cache_dtype is not None:
            _checks.one_of(
                self, "cache_dtype", self.cache_dtype, ("bfloat16", "float16", "float32")
            )
        _checks.require(
            self,
            self.rotary_dim >= 0 and (self.rope_base is None or self.rotary_dim % 2 == 0),
            f"`rotary_dim` must be >= 0, and even with a rope_base, got {self.rotary_dim}; pass"
            " rope_base=None for no rotation.",
        )
        _checks.require(
            self,
            self.rope_base is None or self.rope_base > 1,
            f"`rope_base` must be > 1 or None, got {self.rope_base}.",
        )
        _checks.above_zero(self, norm_eps=self.norm_eps)

    @property
    def values(self) -> int:
        """Value features per head: `value_dim`, by default head_dim."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def key_dim(self) -> int:
        """Features of a head's queries and keys."""
        return self.head_dim + self.rotary_dim

    @property
    def _core(self) -> Cache:
        rotated = 0 if self.rope_base is None else self.rotary_dim
        scale = self.key_dim**-0.5 if self.scale is None else self.scale
        return Cache(self.capacity, Rotary(rotated, self.rope_base or 1.0), scale)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        def weight(inputs: int, outputs: int, *axes: str | None) -> Param:
            return Param((inputs, outputs), axes, "weight", _init.fan_in_normal)

        def vector(width: int, role: Any, axis: str | None = None) -> Param:
            return Param((width,), (axis,), role, _init.ones if role == "norm" else _init.zeros)

        heads, queries = self.heads, self.heads * self.key_dim
        params: dict[str, Param | Layer] = {
            "kv_down": weight(self.dim, self.kv_rank, "embed", None),
            "kv_norm": vector(self.kv_rank, "norm"),
            "k_up": weight(self.kv_rank, heads * self.head_dim, None, "heads"),
            "v_up": weight(self.kv_rank, heads * self.values, None, "heads"),
            "out_proj": weight(heads * self.values, self.dim, "heads", "embed"),
        }
        if self.rotary_dim:
            params["k_rope"] = weight(self.dim, self.rotary_dim, "embed", None)
        if self.q_rank is None:
            params["q_proj"] = weight(self.dim, queries, "embed", "heads")
        else:
            params["q_down"] = weight(self.dim, self.q_rank, "embed", None)
            params["q_norm"] = vector(self.q_rank, "norm")
            params["q_up"] = weight(self.q_rank, queries, None, "heads")
        if self.bias:
            params["kv_down_bias"] = vector(self.kv_rank, "bias")
            params["out_bias"] = vector(self.dim, "bias", "embed")
            if self.rotary_dim:
                params["k_rope_bias"] = vector(self.rotary_dim, "bias")
            if self.q_rank is not None:
                params["q_down_bias"] = vector(self.q_rank, "bias")
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.capacity)
        dtype = dtype if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return {
            "latent": jnp.zeros((*shape, self.rotary_dim + self.kv_rank), dtype),
            "valid": jnp.zeros(shape, jnp.bool_),
        }

    def state_flops(self) -> int:
        features = 2 * self.kv_rank + self.rotary_dim  # scores and the weighted sum of latents
        return 2 * self.capacity * self.heads * features

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        length = x.shape[1]
        _checks.require(
            self,
            context.reset is not None or not isinstance(length, int) or length <= self.capacity,
            f"`x` must have at most capacity={self.capacity} positions, got {length}; make the"
            " layer with a larger capacity.",
        )
        rotary, heads = self.rotary_dim, self.heads
        q, q_rope = self._queries(params, x)
        latent = dense(x, params["kv_down"], params.get("kv_down_bias"))
        latent = rms_normalize(latent, params["kv_norm"], self.norm_eps)
        if rotary:
            shared = dense(x, params["k_rope"], params.get("k_rope_bias"))
            latent = jnp.concatenate([self._paired(shared), latent], axis=-1)
        k_up, v_up = (split_heads(params[f"{name}_up"].astype(x.dtype), heads) for name in "kv")
        cached = {"k": latent[:, :, None]}  # one head for all
        cache = {"k": state["latent"][:, :, None], "valid": state["valid"]}
        one_step = isinstance(length, int) and length == 1 and context.sequence_axis is None
        if one_step:
            # q [B, 1, 1, H, rotary_dim + kv_rank] meets the latents themselves.
            q = jnp.einsum("bthd,rhd->bthr", q, k_up)
            q = jnp.concatenate([q_rope, q], axis=-1)[:, :, None]
            o, cache = self._core.attend_cached(
                q, cached, cache, context, lambda z: (z["k"], z["k"][..., rotary:])
            )
            o = jnp.einsum("bthr,rhd->bthd", o[:, :, 0], v_up)
        else:
            q = jnp.concatenate([q_rope, q], axis=-1)[:, :, :, None]

            def expand(entries: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
                shared, c = jnp.split(entries["k"][:, :, 0], [rotary], axis=-1)
                k, v = (jnp.einsum("bsr,rhd->bshd", c, up) for up in (k_up, v_up))
                shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], rotary))
                return jnp.concatenate([shared, k], axis=-1), v

            o, cache = self._core.attend_cached(q, cached, cache, context, expand)
            o = o[:, :, :, 0]
        y = dense(merge_heads(o), params["out_proj"], params.get("out_bias"))
        return y, {"latent": cache["k"][:, :, 0], "valid": cache["valid"]}

    def _queries(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return both parts of the queries, [B, T, H, head_dim] and [B, T, H, rotary_dim]."""
        if self.q_rank is None:
            q = dense(x, params["q_proj"])
        else:
            low = dense(x, params["q_down"], params.get("q_down_bias"))
            q = dense(rms_normalize(low, params["q_norm"], self.norm_eps), params["q_up"])
        own, shared = jnp.split(split_heads(q, self.heads), [self.head_dim], axis=-1)
        return own, self._paired(shared)

    def _paired(self, z: jax.Array) -> jax.Array:
        """Move the features 2j and 2j + 1 to j and j + R/2, the pairs that `Rotary` rotates.

        Queries and keys have the same order, so scores are unchanged.
        """
        if self.rope_base is None:
            return z
        return jnp.concatenate([z[..., 0::2], z[..., 1::2]], axis=-1)
