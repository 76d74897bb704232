"""TTTLinear and TTTMLP: test-time training, memories that learn by gradient descent."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _init
from seqjax.layers._attention import Rotary
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, layer_normalize, merge_heads, split_heads, wide_dense
from seqjax.layers._minibatch import MemoryLayer, Updates
from seqjax.layers._network import Network
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv


@dataclasses.dataclass(frozen=True)
class TTTLinear(MemoryLayer):
    """Test-time training with a linear memory (arXiv 2407.04620).

        u_t, v_t = x_t W_u, x_t W_v
        q_t, k_t = rotate_i(conv_q(u_t)), rotate_i(conv_k(u_t))       i: index in the mini-batch
        f(W; z) = z W + b                                             memory (W, b) per head
        l_t(W) = 1/2 |LN_h(f(W; k_t)) - (v_t - k_t)|^2
        r_t = base_rate sigmoid(x_t w_h + c_h) / K                    per head
        W_t = W_a - s_i sum_{j <= t} r_j grad l_j(W_a)                j: tokens of the mini-batch
        o_t = q_t + LN_h(f(W_t; q_t))
        y_t = (LN(o_t) * gelu(x_t W_g)) W_o

    W_a is the memory at the start of the mini-batch. Gradients are taken there, so that the tokens
    of a mini-batch are computed together. s_i = max(a_i + 1/(i + 1), 0) with learned a. LN_h is a
    layer norm per head with its scale and bias, LN one over the features of all heads. gelu is the
    tanh approximation. W_0 is learned. A mini-batch begins, with W_a = W_0, at the start of a
    sequence and at every reset.

    Departures: projections start normal with variance 1/fan_in, where the authors use 0.02. Rotated
    pairs are features j and j + K/2, as in their PyTorch code. The output gate is always on; in
    their code it is an option.

    Cost: a mini-batch may start anywhere, so gradients are computed twice. The backward pass
    stores one state per mini-batch.

    Initialization: W_0 normal with standard deviation 0.02; b_0, a and c zero.

    Parameters: qk_proj, v_proj, gate_proj [dim, dim], q_conv, k_conv (`ShortConv` with bias),
    rate_proj [dim, H], rate_bias [H], token_scale [mini_batch] (a), W1 [H, K, K], b1 [H, K],
    inner_scale, inner_bias [H, K], norm_scale, norm_bias [dim], out_proj [dim, dim].
    State: {"q_conv", "k_conv", "memory"}. The memory holds "change" (for each matrix with its bias
    as last row [B, H, 2, K + 1, K]: W_a - W_0, and minus the sum of rate times gradient), "start"
    [B, H, 2] (constant) and "index" [B] (tokens of the mini-batch so far).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = TTTLinear(dim=8, heads=2, mini_batch=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"]["index"].tolist()
      ((2, 5, 8), (2, 8), [2.0, 2.0])

    Attributes:
      dim: features of input and output.
      heads: number of heads H, with K = dim / H features each.
      mini_batch: tokens in a mini-batch.
      base_rate: largest learning rate, before it is divided by K.
      conv_size: taps of the short convolutions.
      rotary_base: base of the frequencies of the rotation.
      norm_eps: constant added to the variance in all norms.
    """

    dim: int
    heads: int
    mini_batch: int = 16
    base_rate: float = 1.0
    conv_size: int = 4
    rotary_base: float = 10000.0
    norm_eps: float = 1e-6

    # The anchor, and the sum of gradients of the mini-batch.
    _fresh: ClassVar[tuple[float, ...]] = (1.0, 0.0)
    _kept: ClassVar[tuple[float, ...]] = (0.0,)

    def __post_init__(self) -> None:
        size = _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, mini_batch=self.mini_batch, conv_size=self.conv_size)
        _checks.require(
            self,
            size % 2 == 0,
            f"`dim` must be an even multiple of `heads`, got dim={self.dim}, heads={self.heads}.",
        )
        _checks.above_zero(
            self, base_rate=self.base_rate, rotary_base=self.rotary_base, norm_eps=self.norm_eps
        )

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    @property
    def network(self) -> Network:
        return Network(self.heads, (self.head_dim, self.head_dim), bias=True)

    def _conv(self) -> ShortConv:
        return ShortConv(self.dim, self.conv_size, bias=True, channel_axis="heads")

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        per_head, heads = (self.heads, self.head_dim), ("heads", "head_dim")
        return {
            "qk_proj": inward,
            "q_conv": self._conv(),
            "k_conv": self._conv(),
            "v_proj": inward,
            "rate_proj": Param(
                (self.dim, self.heads), ("embed", "heads"), "weight", _init.fan_in_normal
            ),
            "rate_bias": Param((self.heads,), ("heads",), "recurrence", _init.zeros),
            "token_scale": Param((self.mini_batch,), (None,), "recurrence", _init.zeros),
            **self.network.declare_params(_init.normal(0.02)),
            "inner_scale": Param(per_head, heads, "norm", _init.ones),
            "inner_bias": Param(per_head, heads, "norm", _init.zeros),
            "norm_scale": Param((self.dim,), ("heads",), "norm", _init.ones),
            "norm_bias": Param((self.dim,), ("heads",), "norm", _init.zeros),
            "gate_proj": inward,
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        conv = self._conv().make_state(batch_size, dtype)
        return {
            "q_conv": conv,
            "k_conv": conv,
            "memory": self.memory_state(batch_size, dtype),
        }

    def _rotated(self, x: jax.Array, index: jax.Array) -> jax.Array:
        rotary = Rotary(self.head_dim, self.rotary_base)
        angles = rotary.angles(np.arange(self.mini_batch))
        cos, sin = (jnp.asarray(f(angles), x.dtype)[index] for f in (np.cos, np.sin))
        return rotary.rotate(x, cos[:, :, None], sin[:, :, None])

    def updates(self, params: Params, tokens: Mapping[str, jax.Array], index: jax.Array) -> Updates:
        q, k = (self._rotated(tokens[name], index) for name in "qk")
        rate = jax.nn.sigmoid(tokens["rate"]) * (self.base_rate / self.head_dim)
        scale = params["token_scale"].astype(rate.dtype)
        scale = jnp.maximum(scale + 1 / jnp.arange(1, self.mini_batch + 1, dtype=rate.dtype), 0)
        scale = jnp.broadcast_to(scale[index][..., None], rate.shape)
        return Updates(
            q=q,
            k=k,
            v=tokens["v"],
            write=jnp.stack([jnp.zeros_like(rate), -rate], axis=-1),
            read=jnp.stack([jnp.ones_like(scale), scale], axis=-1),
        )

    def _inner_norm(self, params: Params, y: jax.Array) -> jax.Array:
        """Normalize y [B, H, T, K] per head."""
        scale, bias = (params[f"inner_{name}"][:, None] for name in ("scale", "bias"))
        return layer_normalize(y, scale, bias, self.norm_eps)

    def readout(self, params: Params, y: jax.Array, q: jax.Array) -> jax.Array:
        return q + self._inner_norm(params, y)

    def inner_loss(self, params: Params, y: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        error = self._inner_norm(params, y) - (v - k)
        return jnp.sum(error * error) / 2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide, new_state, conv = state_dtype(x.dtype), {}, self._conv()
        tokens = {"v": dense(x, params["v_proj"])}
        shared = dense(x, params["qk_proj"])
        for name in ("q", "k"):
            key = f"{name}_conv"
            tokens[name], new_state[key] = conv.forward(params[key], shared, state[key], context)
        tokens = {name: split_heads(z.astype(wide), self.heads) for name, z in tokens.items()}
        rate = wide_dense(x, params["rate_proj"]) + params["rate_bias"].astype(wide)
        o, new_state["memory"] = self.scan_memory(
            params, tokens | {"rate": rate}, state["memory"], context
        )
        o = merge_heads(o).astype(x.dtype)
        o = layer_normalize(o, params["norm_scale"], params["norm_bias"], self.norm_eps)
        gate = jax.nn.gelu(dense(x, params["gate_proj"]))
        return dense(o * gate, params["out_proj"]), new_state


@dataclasses.dataclass(frozen=True)
class TTTMLP(TTTLinear):
    """Test-time training with a memory of two layers (arXiv 2407.04620).

        f(W; z) = gelu(z W_1 + b_1) W_2 + b_2                         4 K hidden features

    in place of the linear memory of `TTTLinear`, which has the other equations, the departures and
    the cost. Gradients of both layers are taken. gelu is the tanh approximation, here and in the
    output gate.

    Parameters: those of `TTTLinear`, with W1 [H, K, 4 K], b1 [H, 4 K], W2 [H, 4 K, K], b2 [H, K].
    State: that of `TTTLinear`, with two matrices in "change".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = TTTMLP(dim=8, heads=2, mini_batch=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, [s.shape for s in state["memory"]["change"]]
      ((2, 5, 8), (2, 8), [(2, 2, 2, 5, 16), (2, 2, 2, 17, 4)])

    Attributes:
      dim, heads, mini_batch, conv_size, rotary_base, norm_eps: see `TTTLinear`.
      base_rate: largest learning rate, before it is divided by K.
      expand: hidden features of the memory per feature of a head.
    """

    base_rate: float = 0.1
    expand: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(self, expand=self.expand)

    @property
    def network(self) -> Network:
        sizes = (self.head_dim, self.expand * self.head_dim, self.head_dim)
        return Network(self.heads, sizes, bias=True)
