"""Recurrent Delta Net: a DeltaNet whose keys, values and queries also read the previous output."""

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

NAMES = ("q", "k", "v", "beta")


@dataclasses.dataclass(frozen=True)
class RecurrentDeltaNet(Layer):
    """Recurrent Delta Net, a recurrent fast weight programmer (arXiv 2106.06295).

        r_t = tanh(o_{t-1})                                                 per head
        q_t = softmax(x_t W_q + r_t R_q)
        k_t = softmax(x_t W_k + r_t R_k)
        v_t = x_t W_v + r_t R_v
        beta_t = sigmoid(x_t W_beta + r_t R_beta)
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T                  [K, K]
        o_t = S_t^T q_t
        y_t = K^-0.5 o_t W_o

    The update of S depends on the previous output, so the recurrence has no parallel form.
    `step_scan` computes it step by step. Without the matrices R, the recurrence is linear in S:
    that layer is `DeltaNet(feature_map="softmax")`.

    Departures: the residual connection and the norm of the authors' layer are not part of it; the
    backbone provides them. The matrices W start normal with variance 1/fan_in; the authors use
    PyTorch's default.

    Initialization: R normal with variance 1 / K, as in the authors' code.

    Parameters: q_proj, k_proj, v_proj [dim, H K], beta_proj [dim, H], R_q, R_k, R_v [H, K, K],
    R_beta [H, K, 1], out_proj [H K, dim].
    State: {"memory": S [B, H, K, K], "output": o [B, H, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RecurrentDeltaNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: features per head K, of keys and values; by default dim / heads.
    """

    dim: int
    heads: int
    head_dim: int | None = None

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)

    @property
    def key_dim(self) -> int:
        """Features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        size = self.key_dim
        params: dict[str, Param | Layer] = {}
        for name in NAMES:
            width = 1 if name == "beta" else size
            params[f"{name}_proj"] = Param(
                (self.dim, self.heads * width), ("embed", "heads"), "weight", _init.fan_in_normal
            )
            params[f"R_{name}"] = Param(
                (self.heads, size, width),
                ("heads", "head_dim", None),
                "recurrence",
                _init.fan_in_normal,
            )
        params["out_proj"] = Param(
            (self.heads * size, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
        )
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        lead, size = (batch_size, self.heads), self.key_dim
        return {
            "memory": jnp.zeros((*lead, size, size), dtype),
            "output": jnp.zeros((*lead, size), dtype),
        }

    def state_flops(self) -> int:
        # Two reads and one write, of 2 K^2 operations each. The products with R count as weights.
        return 6 * self.heads * self.key_dim**2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        inputs = [
            split_heads(dense(x, params[f"{name}_proj"]).astype(wide), self.heads) for name in NAMES
        ]
        recurrent = [params[f"R_{name}"].astype(wide) for name in NAMES]
        o, state = step_scan(
            _step,
            jnp.concatenate(recurrent, axis=-1),
            jnp.concatenate(inputs, axis=-1),
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = merge_heads(o * self.key_dim**-0.5).astype(x.dtype)
        return dense(o, params["out_proj"]), state


def _step(recurrent: jax.Array, state: State, x: jax.Array) -> tuple[State, jax.Array]:
    """Take one step with R [H, K, 3 K + 1] and x_t W [H, 3 K + 1] of q, k, v and beta."""
    memory, size = state["memory"], state["output"].shape[-1]
    sums = x + linalg.read(recurrent, jnp.tanh(state["output"]))
    q, k, v, beta = jnp.split(sums, [size, 2 * size, 3 * size], axis=-1)
    q, k = jax.nn.softmax(q, axis=-1), jax.nn.softmax(k, axis=-1)
    write = jax.nn.sigmoid(beta) * (v - linalg.read(memory, k))
    memory = memory + linalg.outer(k, write)
    o = linalg.read(memory, q)
    return {"memory": memory, "output": o}, o
