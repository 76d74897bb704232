"""RWKV-5 and RWKV-6: a matrix memory with decays per key channel, read before it is written."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init, _rwkv
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, layer_normalize, merge_heads, split_heads
from seqjax.layers.context import Context
from seqjax.layers.token_shift import initial_shift, shift
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class RWKV6(Layer):
    """Time mixing of RWKV-6, or with `data_dependent=False` of RWKV-5 (arXiv 2404.05892).

        d_t = x_{t-1} - x_t
        m^c_t = tanh((x_t + d_t x_x) A)_c B_c                   RWKV-6, otherwise 0
        x^c_t = x_t + d_t (x_c + m^c_t)                         c in w, k, v, r, g
        r_t, k_t, v_t = x^r_t W_r, x^k_t W_k, x^v_t W_v         per head
        log w_t = -exp(w0 + tanh(x^w_t w1) w2)                  RWKV-6, otherwise -exp(w0)
        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
        S_t = diag(w_t) S_{t-1} + k_t v_t^T                     [K, K] per head
        y_t = (layernorm(o_t) * silu(x^g_t W_g)) W_o

    The layer norm is per head, with scale and bias per channel.

    Initial values are those of the authors' code for all parameters but the five square matrices,
    which start normal with variance 1 / fan_in. With `zero_init` W_o starts at 0. Some values
    depend on the place of the block in the model: pass `layer` and `depth`, with a list of layers
    for the backbone.

    Departures: the norm of RWKV-5's code is of o / 8 with an eps of 1e-5, which is the same as an
    eps of 64e-5 without the division.

    Parameters: x_w, x_k, x_v, x_r, x_g [dim], the shares of the previous input; r_proj, k_proj,
    v_proj, gate_proj, out_proj [dim, dim]; w0 [dim]; u [H, K]; norm_scale, norm_bias [dim]. RWKV-6
    also has x_x [dim], mix_down [dim, 5 * mix_rank] (A), mix_up [5, mix_rank, dim] (B, in the order
    w, k, v, r, g), w1 [dim, decay_rank], w2 [decay_rank, dim]; RWKV-5 has no x_w.
    State: {"shift": [B, 1, dim], "memory": [B, H, K, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RWKV6(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H, of K = dim / H features; published models have K = 64.
      data_dependent: whether mixtures and decays depend on the input, as in RWKV-6.
      mix_rank: rank of the maps to the mixtures.
      decay_rank: rank of the map to the decays.
      layer: index of the block in the model, for the initial values.
      depth: number of blocks of the model, for the initial values.
      zero_init: whether W_o starts at 0.
      norm_eps: constant added to the variance in the norm.
      present_share: whether the shares x_c are those of the present input, as in checkpoints of
        RWKV-5: x^c_t = x_{t-1} + (x_t - x_{t-1}) x_c.
    """

    dim: int
    heads: int
    data_dependent: bool = True
    mix_rank: int = 32
    decay_rank: int = 64
    layer: int = 0
    depth: int = 1
    zero_init: bool = False
    norm_eps: float = 64e-5
    present_share: bool = False

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, mix_rank=self.mix_rank, decay_rank=self.decay_rank)
        _rwkv.check_layer_index(self)
        _checks.require(
            self,
            not (self.present_share and self.data_dependent),
            "`present_share` must be False for data_dependent=True, whose shares are those of the"
            " previous input; leave it out.",
        )

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim = self.dim
        first_to_last, last_to_first = _rwkv.depth_ratios(self)

        def ramp(i: jax.Array) -> jax.Array:
            return i / max(dim - 1, 1)

        def bonus(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            i = jnp.arange(dim, dtype=dtype)
            return (first_to_last * (1 - ramp(i)) + 0.1 * ((i + 1) % 3 - 1)).reshape(shape)

        def decay(i: jax.Array) -> jax.Array:
            return -6 + 5 * ramp(i) ** (0.7 + 1.3 * first_to_last)

        share = functools.partial(_rwkv.declare_share, dim, present=self.present_share)
        square = Param((dim, dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        scale = ((self.layer + 1) / self.depth) ** 0.7
        params: dict[str, Param | Layer] = {
            "x_k": share(last_to_first),
            "x_v": share(last_to_first, 0.3 * first_to_last),
            "x_r": share(0.5 * last_to_first),
            "x_g": share(0.5 * last_to_first),
            **dict.fromkeys(("r_proj", "k_proj", "v_proj", "gate_proj"), square),
            "w0": Param((dim,), ("heads",), "recurrence", _rwkv.per_channel(decay)),
            "u": Param((self.heads, self.head_dim), ("heads", None), "recurrence", bonus),
            "norm_scale": Param((dim,), ("heads",), "norm", jax.nn.initializers.constant(scale)),
            "norm_bias": Param((dim,), ("heads",), "norm", _init.zeros),
            "out_proj": Param(
                (dim, dim),
                ("heads", "embed"),
                "weight",
                _init.zeros if self.zero_init else _init.fan_in_normal,
            ),
        }
        if not self.data_dependent:
            return params
        mix, rank, small = self.mix_rank, self.decay_rank, _init.uniform(-0.01, 0.01)
        return params | {
            "x_x": share(last_to_first),
            "x_w": share(last_to_first),
            "mix_down": Param((dim, 5 * mix), ("embed", None), "weight", _init.zeros),
            "mix_up": Param((5, mix, dim), (None, None, "embed"), "weight", small),
            "w1": Param((dim, rank), ("embed", None), "weight", _init.zeros),
            "w2": Param((rank, dim), (None, "heads"), "weight", small),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.heads, self.head_dim, self.head_dim)
        return {
            "shift": initial_shift(batch_size, self.dim, dtype),
            "memory": jnp.zeros(shape, dtype),
        }

    def state_flops(self) -> int:
        return 5 * self.heads * self.head_dim**2  # read 2, decay 1, write 2

    def _mixtures(self, params: Params, x: jax.Array, previous: jax.Array) -> dict[str, jax.Array]:
        """Return x^c by name."""
        names = "wkvrg" if self.data_dependent else "kvrg"
        shares = {name: params[f"x_{name}"].astype(state_dtype(x.dtype)) for name in names}
        if self.data_dependent:
            low = jnp.tanh(dense(_rwkv.mix(x, previous, params["x_x"]), params["mix_down"]))
            low = split_heads(low, 5)
            up = params["mix_up"]
            shares = {
                name: share + dense(low[..., i, :], up[i]).astype(share.dtype)
                for i, (name, share) in enumerate(shares.items())
            }
        return {
            name: _rwkv.mix(x, previous, share, self.present_share)
            for name, share in shares.items()
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        previous, last = shift(x, state["shift"], context)
        mixed = self._mixtures(params, x, previous)
        heads = functools.partial(split_heads, heads=self.heads)
        r, k, v = (heads(dense(mixed[name], params[f"{name}_proj"])) for name in "rkv")
        exponent = params["w0"].astype(wide)
        if self.data_dependent:
            low = jnp.tanh(dense(mixed["w"], params["w1"]))
            exponent = exponent + dense(low, params["w2"]).astype(wide)
        exponent = jnp.broadcast_to(exponent, x.shape)
        o, memory = linear_attention(
            r,
            k,
            v,
            heads(-jnp.exp(exponent)),
            state["memory"],
            scale=1.0,
            exclusive=True,
            bonus=params["u"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        scale, bias = (heads(params[f"norm_{name}"]) for name in ("scale", "bias"))
        o = merge_heads(layer_normalize(o.astype(wide), scale, bias, self.norm_eps))
        gate = jax.nn.silu(dense(mixed["g"], params["gate_proj"]))
        o = (o * gate.astype(wide)).astype(x.dtype)
        return dense(o, params["out_proj"]), {"shift": last, "memory": memory}
