"""mLSTM: a matrix memory with an exponential or a sigmoid input gate, of xLSTM."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._exponential import normalized_attention, stabilize
from seqjax.layers._math import block_dense, dense, layer_normalize, merge_heads, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.matrix_state.linear_attention import linear_attention

VARIANTS = ("xlstm", "7b", "sig")
UNUSED = {
    "xlstm": ("expand_k", "expand_v", "gate_cap"),
    "7b": ("expand", "conv_size", "block"),
    "sig": ("expand", "conv_size", "block"),
}


@dataclasses.dataclass(frozen=True)
class MLSTM(Layer):
    """Matrix LSTM of xLSTM (arXiv 2405.04517), xLSTM 7B (2503.13427) and mLSTMsig (2503.14376).

        C_t = f_t C_{t-1} + i_t k_t v_t^T                                [K, V] per head
        n_t = f_t n_{t-1} + i_t k_t                                      [K] per head
        h_t = C_t^T q_t / (max(|n_t^T q_t|, 1) + eps exp(m_t))           q scaled by K^-0.5
        f_t = sigmoid(f~_t),  i_t = exp(i~_t)                            "sig": i_t = sigmoid(i~_t)

    The block around the memory is, with LN the layer norm per head without a bias,

        "xlstm":      a, z = x W_up;  c = silu(conv(a));  q, k = c B_q, c B_k;  v = a B_v
                      i~, f~ = [q, k, v] W_i + b_i, [q, k, v] W_f + b_f
                      y = ((LN(h) + skip * c) * silu(z)) W_down
        "7b", "sig":  q, k, v = x W_q, x W_k, x W_v
                      i~, f~ = cap(x W_i + b_i), cap(x W_f + b_f),  cap(u) = 15 tanh(u / 15)
                      y = (sigmoid(x W_ogate) * LN(h)) W_o

    B_q, B_k and B_v are block-diagonal. "sig" divides by the normalizer only if `normalizer` is
    true. The memory is stored times exp(-m_t), where m_t = max(m_{t-1} + log f_t, i~_t), so that no
    gate overflows. By default m starts at -inf, eps is 0, and the result does not depend on m.

    Departures: the authors' code has `denominator_eps=1e-6` and `zero_maximum=True`, with which the
    result depends on m. The papers also allow f = exp(f~). The output projection does not start
    smaller in deeper models.

    Initialization: W_up, B_q, B_k, B_v normal with variance 2 / (5 dim). W_i and W_f zero in
    "xlstm". b_f from 3 to 6 over the heads; b_i normal with standard deviation 0.1 in "xlstm", -10
    in the others. Other projections normal with variance 1/fan_in.

    Parameters, "xlstm" with I = expand * dim: up_proj [dim, 2 I], conv (`ShortConv` with bias),
    q_proj, k_proj, v_proj [I / block, block, block], igate_proj, fgate_proj [3 I, H], igate_bias,
    fgate_bias [H], norm [H * V], starts at 0 and is added to 1, skip [I], down_proj [I, dim].
    Parameters, "7b" and "sig": q_proj, k_proj [dim, H * K], v_proj, ogate_proj [dim, H * V],
    igate_proj, fgate_proj [dim, H], igate_bias, fgate_bias [H], norm [H * V], out_proj
    [H * V, dim].
    State: {"memory": [B, H, K, V]}, with a normalizer also "normalizer" [B, H, K], with exponential
    gates "maximum" [B, H] (m), and in "xlstm" "conv" [B, conv_size - 1, I].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MLSTM(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 8, 8))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      variant: "xlstm", "7b" or "sig".
      expand: I = expand * dim in "xlstm", where K = V = I / H.
      expand_k: key features of all heads per feature of the input in "7b" and "sig":
        K = expand_k * dim / H.
      expand_v: the same for values in "7b" and "sig": V = expand_v * dim / H.
      conv_size: taps of the short convolution in "xlstm".
      block: features per block of B_q, B_k and B_v in "xlstm".
      gate_cap: bound of the gates' logarithms in "7b" and "sig".
      normalizer: whether "sig" divides by the normalizer. The others always do.
      norm_eps: constant added to the variance in the norm.
      denominator_eps: eps, added to the denominator in units of exp(m).
      zero_maximum: whether m starts at 0, also after a reset.
    """

    dim: int
    heads: int
    variant: Literal["xlstm", "7b", "sig"] = "xlstm"
    expand: int = 2
    expand_k: float = 0.5
    expand_v: float = 1.0
    conv_size: int = 4
    block: int = 4
    gate_cap: float = 15.0
    normalizer: bool = False
    norm_eps: float = 1e-6
    denominator_eps: float = 0.0
    zero_maximum: bool = False

    def __post_init__(self) -> None:
        _checks.positive(
            self,
            dim=self.dim,
            heads=self.heads,
            expand=self.expand,
            conv_size=self.conv_size,
            block=self.block,
        )
        _checks.one_of(self, "variant", self.variant, VARIANTS)
        _checks.above_zero(self, gate_cap=self.gate_cap)
        for name in UNUSED[self.variant]:
            given, default = getattr(self, name), getattr(type(self), name)
            _checks.require(
                self,
                given == default,
                f"`{name}` must be {default} for variant={self.variant!r}, which does not read"
                f" it, got {given}; leave it out.",
            )
        _checks.require(
            self,
            self.variant == "sig" or not self.normalizer,
            f"`normalizer` must be False for variant={self.variant!r}, which always divides by it;"
            " leave it out.",
        )
        _checks.require(
            self,
            self.denominator_eps == 0 or (self._divides and self.denominator_eps > 0),
            "`denominator_eps` must be >= 0, and 0 without a normalizer, got"
            f" {self.denominator_eps}.",
        )
        _checks.require(
            self,
            self.variant != "sig" or not self.zero_maximum,
            "`zero_maximum` must be False for variant='sig', which has no maximum; leave it out.",
        )
        if self.variant == "xlstm":
            for name in ("heads", "block"):
                _checks.require(
                    self,
                    self.inner % getattr(self, name) == 0,
                    f"`expand` * dim must be a multiple of `{name}`, got {self.inner} and"
                    f" {getattr(self, name)}.",
                )
            return
        for name in ("expand_k", "expand_v"):
            size = getattr(self, name) * self.dim
            _checks.require(
                self,
                math.isclose(size, round(size)) and size >= 1 and round(size) % self.heads == 0,
                f"`{name} * dim` must be a positive multiple of `heads`, got {size:g} and"
                f" {self.heads}.",
            )

    @property
    def inner(self) -> int:
        """Value features of all heads: expand * dim in "xlstm", else expand_v * dim."""
        xlstm = self.variant == "xlstm"
        return self.expand * self.dim if xlstm else round(self.expand_v * self.dim)

    @property
    def key_dim(self) -> int:
        """Key features per head K."""
        keys = self.inner if self.variant == "xlstm" else round(self.expand_k * self.dim)
        return keys // self.heads

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return self.inner // self.heads

    @property
    def _conv(self) -> ShortConv:
        return ShortConv(
            self.inner, self.conv_size, bias=True, activation="silu", channel_axis="heads"
        )

    @property
    def _first_maximum(self) -> float:
        return 0.0 if self.zero_maximum else -math.inf

    @property
    def _divides(self) -> bool:
        return self.variant != "sig" or self.normalizer

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inner, heads, xlstm = self.inner, self.heads, self.variant == "xlstm"
        small = _init.normal((2 / (5 * self.dim)) ** 0.5)

        def inward(width: int, start: Any = _init.fan_in_normal) -> Param:
            return Param((self.dim, width), ("embed", "heads"), "weight", start)

        gate = Param((self.dim, heads), ("embed", "heads"), "recurrence", _init.fan_in_normal)
        out = Param((inner, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {}
        if xlstm:
            shape = (inner // self.block, self.block, self.block)
            block = Param(shape, ("heads", None, None), "weight", small)
            gate = Param((3 * inner, heads), (None, "heads"), "recurrence", _init.zeros)
            params |= {"up_proj": inward(2 * inner, small), "conv": self._conv}
            params |= {"q_proj": block, "k_proj": block, "v_proj": block}
            params |= {"skip": Param((inner,), ("heads",), "norm", _init.ones), "down_proj": out}
        else:
            keys = inward(heads * self.key_dim)
            params |= {"q_proj": keys, "k_proj": keys, "v_proj": inward(inner)}
            params |= {"ogate_proj": inward(inner), "out_proj": out}
        b_i = _init.normal(0.1) if xlstm else _constant(-10.0)
        return params | {
            "igate_proj": gate,
            "igate_bias": Param((heads,), ("heads",), "recurrence", b_i),
            "fgate_proj": gate,
            "fgate_bias": Param((heads,), ("heads",), "recurrence", _three_to_six),
            "norm": Param((inner,), ("heads",), "norm", _init.zeros if xlstm else _init.ones),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.heads, self.key_dim, self.value_dim)
        state = {"memory": jnp.zeros(shape, dtype)}
        if self._divides:
            state["normalizer"] = jnp.zeros(shape[:3], dtype)
        if self.variant != "sig":
            state["maximum"] = jnp.full(shape[:2], self._first_maximum, dtype)
        if self.variant == "xlstm":
            state["conv"] = self._conv.make_state(batch_size, dtype)
        return state

    def state_flops(self) -> int:
        columns = self.value_dim + self._divides
        return 5 * self.heads * self.key_dim * columns  # decay 1, write 2, read 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        if self.variant == "xlstm":
            a, z = jnp.split(dense(x, params["up_proj"]), 2, axis=-1)
            c, conv = self._conv.forward(params["conv"], a, state["conv"], context)
            q, k, v = (
                block_dense(y, params[f"{name}_proj"]) for name, y in (("q", c), ("k", c), ("v", a))
            )
            gated = jnp.concatenate([q, k, v], axis=-1)
            h, new_state = self._remember(params, (q, k, v), gated, state, context)
            h = self._normalize(h, 1 + params["norm"].astype(h.dtype)).astype(x.dtype)
            h = (h + params["skip"].astype(x.dtype) * c) * jax.nn.silu(z)
            return dense(h, params["down_proj"]), new_state | {"conv": conv}
        q, k, v = (dense(x, params[f"{name}_proj"]) for name in "qkv")
        h, new_state = self._remember(params, (q, k, v), x, state, context)
        h = self._normalize(h, params["norm"]).astype(x.dtype)
        h = jax.nn.sigmoid(dense(x, params["ogate_proj"])) * h
        return dense(h, params["out_proj"]), new_state

    def _gate(self, params: Params, name: str, gated: jax.Array) -> jax.Array:
        """Return the logarithm of a gate before its nonlinearity, [B, T, H] in the state dtype.

        An exponential multiplies its rounding error, so this small product is not narrow.
        """
        wide = state_dtype(gated.dtype)
        weight, bias = params[f"{name}_proj"].astype(wide), params[f"{name}_bias"].astype(wide)
        gate = gated.astype(wide) @ weight + bias
        return gate if self.variant == "xlstm" else self.gate_cap * jnp.tanh(gate / self.gate_cap)

    def _remember(
        self,
        params: Params,
        qkv: tuple[jax.Array, ...],
        gated: jax.Array,
        state: State,
        context: Context,
    ) -> tuple[jax.Array, State]:
        """Return h [B, T, H, V] in the state dtype, and the new state of the memory."""
        q, k, v = (split_heads(y, self.heads) for y in qkv)
        wide = state_dtype(q.dtype)
        log_decay = jax.nn.log_sigmoid(self._gate(params, "fgate", gated))
        gate = self._gate(params, "igate", gated)
        floor, new_state = jnp.ones((), wide), {}
        if self.variant == "sig":
            weight = jax.nn.sigmoid(gate)
        else:
            stable = stabilize(
                log_decay,
                gate,
                state["maximum"],
                context,
                fresh=self._first_maximum,
                read=self.denominator_eps > 0,
            )
            log_decay, weight = stable.log_decay, stable.weight
            # At m < -88 this is inf in float32, and the quotient the correct 0.
            floor, new_state["maximum"] = jnp.exp(-stable.maximum), stable.last
        k = k.astype(wide) * weight[..., None]
        if not self._divides:
            h, new_state["memory"] = linear_attention(
                q,
                k,
                v.astype(wide),
                log_decay,
                state["memory"],
                reset=context.reset,
                sequence_axis=context.sequence_axis,
            )
            return h, new_state
        h, n, memory = normalized_attention(q, k, v, log_decay, state, context)
        denominator = jnp.maximum(jnp.abs(n), floor) + self.denominator_eps
        return h / denominator[..., None], new_state | memory

    def _normalize(self, h: jax.Array, scale: jax.Array) -> jax.Array:
        """Normalize h [B, T, H, V] per head; return [B, T, H * V]."""
        scale = scale.reshape(self.heads, self.value_dim)
        return merge_heads(layer_normalize(h, scale, None, self.norm_eps))


def _constant(value: float) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.full(shape, value, dtype)

    return init


def _three_to_six(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return biases of the forget gate from 3 to 6, by head."""
    del key
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)
