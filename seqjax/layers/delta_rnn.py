"""Delta RNN: a recurrent network whose two weight matrices are written by the delta rule."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _feature_maps, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, split_heads, wide_dense
from seqjax.layers.context import Context
from seqjax.ops.core import linalg
from seqjax.ops.matrix_state.delta_rule import delta_rule
from seqjax.ops.step_scan import step_scan


@dataclasses.dataclass(frozen=True)
class DeltaRNN(Layer):
    """Delta RNN, a recurrent fast weight programmer (arXiv 2106.06295, version 2 in its code).

        q_t, k_t = phi(x_t W_q), phi(x_t W_k)                               per head
        beta_t, beta'_t = sigmoid(x_t W_beta), sigmoid(x_t W'_beta)
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T                  v_t = x_t W_v
        k'_t = softmax(x_t W'_k)
        R_t = R_{t-1} + beta'_t k'_t (v'_t - R_{t-1}^T k'_t)^T              v'_t = x_t W'_v
        h_t = S_t^T q_t + R_t^T softmax(h_{t-1})
        y_t = K^-0.5 h_t W_o

    phi(z) = (elu(z) + 1) / (sum(elu(z) + 1) + 1e-6). S does not depend on h, so `delta_rule`
    computes S_t^T q_t for all steps at once. `step_scan` computes R and h step by step.

    Departures: the residual connection and the norm of the authors' layer are not part of it; the
    backbone provides them. The authors' phi does not add 1e-6. Projections start normal with
    variance 1/fan_in; the authors use PyTorch's default.

    Parameters: q_proj, k_proj, v_proj, recurrent_k_proj, recurrent_v_proj [dim, H K], beta_proj,
    recurrent_beta_proj [dim, H], out_proj [H K, dim].
    State: {"memory": S [B, H, K, K], "recurrent": R [B, H, K, K], "output": h [B, H, K]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = DeltaRNN(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["recurrent"].shape
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
        width = self.heads * self.key_dim

        def inward(width: int) -> Param:
            return Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)

        names = ("q", "k", "v", "recurrent_k", "recurrent_v")
        return {
            **{f"{name}_proj": inward(width) for name in names},
            **{f"{name}_proj": inward(self.heads) for name in ("beta", "recurrent_beta")},
            "out_proj": Param((width, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        lead, size = (batch_size, self.heads), self.key_dim
        matrix = jnp.zeros((*lead, size, size), dtype)
        return {"memory": matrix, "recurrent": matrix, "output": jnp.zeros((*lead, size), dtype)}

    def state_flops(self) -> int:
        # Each matrix has two reads and one write, of 2 K^2 operations each.
        return 12 * self.heads * self.key_dim**2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)

        def projected(name: str) -> jax.Array:
            return split_heads(dense(x, params[f"{name}_proj"]), self.heads)

        def rate(name: str) -> jax.Array:
            return jax.nn.sigmoid(wide_dense(x, params[f"{name}_proj"]))

        q, k = (
            _feature_maps.sum_normalize(_feature_maps.features("elu", projected(name)))
            for name in "qk"
        )
        z, memory = delta_rule(
            q.astype(x.dtype),
            k.astype(x.dtype),
            projected("v"),
            rate("beta"),
            None,
            state["memory"],
            scale=1.0,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        inputs = {
            "z": z.astype(wide),
            "k": jax.nn.softmax(projected("recurrent_k").astype(wide), axis=-1),
            "v": projected("recurrent_v").astype(wide),
            "beta": rate("recurrent_beta"),
        }
        h, new_state = step_scan(
            _step,
            (),
            inputs,
            {name: state[name] for name in ("recurrent", "output")},
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        y = dense(merge_heads(h * self.key_dim**-0.5).astype(x.dtype), params["out_proj"])
        return y, new_state | {"memory": memory}


def _step(_: tuple[()], state: State, x: Params) -> tuple[State, jax.Array]:
    """Take one step: z, k, v [H, K], beta [H]."""
    matrix, k = state["recurrent"], x["k"]
    matrix = matrix + linalg.outer(k, x["beta"][:, None] * (x["v"] - linalg.read(matrix, k)))
    h = x["z"] + linalg.read(matrix, jax.nn.softmax(state["output"], axis=-1))
    return {"recurrent": matrix, "output": h}, h
