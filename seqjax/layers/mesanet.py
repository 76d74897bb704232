"""MesaNet: a memory that solves a least-squares problem at every step."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, l2_normalize, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.core import jax_compat
from seqjax.ops.matrix_state.linear_attention import linear_attention

MIN_RIDGE = 0.25


@dataclasses.dataclass(frozen=True)
class MesaNet(Layer):
    """Locally optimal in-context regression, MesaNet (arXiv 2506.05233).

        q, k = q / |q|, k / |k|  of  silu(conv(x W_q)), silu(conv(x W_k));  v = x W_v     per head
        beta_t = sigmoid(x_t W_beta + b_beta),  g_t = log sigmoid(x_t W_a + b_a)
        G_t = exp(g_t) G_{t-1} + beta_t k_t k_t^T                                     [K, K]
        S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T                                     [K, K]
        o_t = S_t^T (G_t + diag(lambda))^-1 q_t,   lambda = softplus(l) + 0.25
        y_t = rmsnorm(o_t) W_o

    o_t is the prediction for q_t of the linear map that fits the values to the keys so far, in the
    sense of ridge regression with decaying weights. Conjugate gradients solve the systems of all
    steps and heads side by side. One iteration costs one `linear_attention`, so that the layer
    costs about `iterations` times GLA. The solution is exact after K iterations, up to rounding.
    Derivatives take one more solve, and no iteration is stored.

    Departures: the authors add 1e-5 to the denominators in the solver, which stops the convergence
    there. Here a system whose residual is zero is left alone. The authors' decoder starts the
    solver at q / (diag G + lambda), here it starts at zero. Projections start normal with variance
    1/fan_in.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], q_conv, k_conv (`ShortConv`), beta_proj, a_proj
    [dim, H], beta_bias, a_bias [H], ridge (l) [H, K], norm [K], out_proj [H * K, dim].
    State: {"q_conv", "k_conv": [B, conv_size - 1, H * K], "gram": G, "memory": S [B, H, K, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MesaNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["gram"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K; by default dim / heads. The authors use 128.
      conv_size: taps of the short convolutions.
      iterations: iterations of the solver. The authors use 30.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    conv_size: int = 4
    iterations: int = 30
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, conv_size=self.conv_size, iterations=self.iterations)

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def _conv(self) -> ShortConv:
        width = self.heads * self.key_dim
        return ShortConv(width, self.conv_size, activation="silu", channel_axis="heads")

    def declare_params(self) -> Mapping[str, Param | Layer]:
        def inward(width: int) -> Param:
            return Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)

        width = self.heads * self.key_dim
        bias = Param((self.heads,), ("heads",), "recurrence", _init.zeros)
        return {
            "q_proj": inward(width),
            "k_proj": inward(width),
            "v_proj": inward(width),
            "q_conv": self._conv,
            "k_conv": self._conv,
            "beta_proj": inward(self.heads),
            "beta_bias": bias,
            "a_proj": inward(self.heads),
            "a_bias": bias,
            "ridge": Param(
                (self.heads, self.key_dim), ("heads", "head_dim"), "recurrence", _unit_ridge
            ),
            "norm": Param((self.key_dim,), ("head_dim",), "norm", _init.ones),
            "out_proj": Param((width, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        matrix = jnp.zeros((batch_size, self.heads, self.key_dim, self.key_dim), dtype)
        conv = self._conv.make_state(batch_size, dtype)
        return {"q_conv": conv, "k_conv": conv, "gram": matrix, "memory": matrix}

    def state_flops(self) -> int:
        # Decay, write and read of S, and of G once more in every iteration.
        return 5 * (self.iterations + 2) * self.heads * self.key_dim**2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        new_state, unit = {}, {}
        for name in ("q", "k"):
            y, conv = dense(x, params[f"{name}_proj"]), f"{name}_conv"
            y, new_state[conv] = self._conv.forward(params[conv], y, state[conv], context)
            unit[name] = l2_normalize(split_heads(y.astype(wide), self.heads))
        q, k = unit["q"], unit["k"]
        v = split_heads(dense(x, params["v_proj"]).astype(wide), self.heads)
        beta, gate = (
            dense(x, params[f"{name}_proj"]).astype(wide) + params[f"{name}_bias"].astype(wide)
            for name in ("beta", "a")
        )
        log_decay, written = jax.nn.log_sigmoid(gate), jax.nn.sigmoid(beta)[..., None] * k
        ridge = jax.nn.softplus(params["ridge"].astype(wide)) + MIN_RIDGE
        # The derivative of the solver requires arrays with equal varying mesh axes in its product.
        q, k, written, log_decay, ridge, gram = jax_compat.match_varying(
            q, k, written, log_decay, ridge, state["gram"]
        )

        def read(queries: jax.Array, values: jax.Array, start: jax.Array) -> Any:
            return linear_attention(
                queries,
                written,
                values,
                log_decay,
                start,
                scale=1.0,
                reset=context.reset,
                sequence_axis=context.sequence_axis,
            )

        def regularized(p: jax.Array) -> jax.Array:
            """Return (G_t + diag(lambda)) p_t for all t. G is symmetric, so it reads like S."""
            return read(p, k, gram)[0] + ridge * p

        def solve(product: Product, b: jax.Array) -> jax.Array:
            return _conjugate_gradients(product, b, self.iterations)

        p = jax.lax.custom_linear_solve(regularized, q, solve, symmetric=True)
        o, new_state["memory"] = read(p, v, state["memory"])
        _, new_state["gram"] = read(p, k, gram)
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps)).astype(x.dtype)
        return dense(o, params["out_proj"]), new_state


Product = Callable[[jax.Array], jax.Array]


def _conjugate_gradients(product: Product, b: jax.Array, iterations: int) -> jax.Array:
    """Return the solutions of A x = b for each vector b of the last axis, A positive definite."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    def improve(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, r, p, length = carry
        image = product(p)
        curvature = dot(p, image)
        # A solved system has nothing to divide by. Its row of A may be NaN, before a reset.
        open_ = (length != 0) & (curvature != 0)
        step = length / jnp.where(open_, curvature, 1)
        rest = jnp.where(open_, r - step * image, r)
        new = dot(rest, rest)
        towards = rest + new / jnp.where(open_, length, 1) * p
        return jnp.where(open_, x + step * p, x), rest, jnp.where(open_, towards, p), new

    start, _ = jax_compat.match_varying(jnp.zeros_like(b), b)
    return jax.lax.fori_loop(0, iterations, improve, (start, b, b, dot(b, b)))[0]


def _unit_ridge(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return l with softplus(l) + 0.25 = 1."""
    del key
    return jnp.full(shape, math.log(math.expm1(1 - MIN_RIDGE)), dtype)
