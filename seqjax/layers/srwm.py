"""SRWM: a weight matrix that reads its input and rewrites itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, split_heads
from seqjax.layers.context import Context
from seqjax.ops.core import linalg
from seqjax.ops.step_scan import step_scan

RATES = 4  # one for each block of the matrix: y, q, k and beta


@dataclasses.dataclass(frozen=True)
class SRWM(Layer):
    """Self-referential weight matrix (arXiv 2202.05780).

        [y_t, q~_t, k~_t, beta~_t] = W_{t-1}^T x_t                     W [K, 3 K + 4] per head
        q_t, k_t = softmax(q~_t), softmax(k~_t)
        W_t = W_{t-1} + k_t (W_{t-1}^T q_t - W_{t-1}^T k_t)^T * r_t    r = sigmoid(beta~)
        output_t = y_t W_o

    r_t has one rate for the columns of each of the four blocks y, q, k and beta. W_0 is learned.
    The step is not linear in W, so it has no parallel form: `step_scan` computes it in order.

    Departures: the authors' layer adds its input, normalized, to the output; here that is left to
    the block around the layer. The output projection starts normal with variance 1/fan_in, where
    the authors have torch's default.

    Initialization: W_0 normal with variance 1 / K, and mean -1 in the block beta.

    Parameters: y_proj, q_proj, k_proj [H, K, K], beta_proj [H, K, 4], out_proj [dim, dim].
    State: W_t - W_0, [B, H, K, 3 K + 4], which is zero at the start.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = SRWM(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 16))

    Attributes:
      dim: features of input and output.
      heads: number of heads H; each reads K = dim / H features of the input.
      input_softmax: whether x_t passes a softmax per head first, an option of the authors' code.
    """

    dim: int
    heads: int
    input_softmax: bool = False

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)

    @property
    def key_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    def declare_params(self) -> Mapping[str, Param | Layer]:
        size = self.key_dim
        axes = ("heads", "head_dim", None)
        square = Param((self.heads, size, size), axes, "weight", _init.fan_in_normal)
        rates = (self.heads, size, RATES)
        return {
            "y_proj": square,
            "q_proj": square,
            "k_proj": square,
            "beta_proj": Param(rates, axes, "weight", _around_minus_one),
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        size = self.key_dim
        return jnp.zeros((batch_size, self.heads, size, 3 * size + RATES), dtype)

    def state_flops(self) -> int:
        size = self.key_dim
        # The sum with W_0, three reads of 2 each, the write of 2.
        return 9 * self.heads * size * (3 * size + RATES)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        blocks = (params[f"{name}_proj"].astype(wide) for name in ("y", "q", "k", "beta"))
        inputs = split_heads(x.astype(wide), self.heads)
        if self.input_softmax:
            inputs = jax.nn.softmax(inputs, axis=-1)
        y, state = step_scan(
            _step,
            jnp.concatenate(list(blocks), axis=-1),
            inputs,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return dense(merge_heads(y).astype(x.dtype), params["out_proj"]), state


def _step(start: jax.Array, change: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read x [H, K] with the matrix start + change [H, K, 3 K + 4], and update the change."""
    weight, size = start + change, x.shape[-1]
    y, q, k, beta = jnp.split(linalg.read(weight, x), [size, 2 * size, 3 * size], axis=-1)
    q, k = jax.nn.softmax(q, axis=-1), jax.nn.softmax(k, axis=-1)
    rates = jax.nn.sigmoid(beta)
    wide = [jnp.repeat(rates[..., i : i + 1], size, axis=-1) for i in range(3)]
    by_column = jnp.concatenate([*wide, jnp.repeat(rates[..., 3:], RATES, axis=-1)], axis=-1)
    # W^T q - W^T k in one read.
    return change + linalg.outer(k, by_column * linalg.read(weight, q - k)), y


def _around_minus_one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _init.fan_in_normal(key, shape, dtype) - 1
