"""Gated DeltaNet-2: a delta rule memory with separate gates for erasing and writing."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from seqjax.layers._base import Layer, Param, Params, state_dtype
from seqjax.layers._math import dense, l2_normalize, repeat_heads, split_heads
from seqjax.layers.context import Context
from seqjax.layers.kda import KDA
from seqjax.ops.matrix_state.generalized_delta_rule import generalized_delta_rule
from seqjax.ops.matrix_state.input_maps import SoftplusGate


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet2(KDA):
    """Gated DeltaNet-2, with gates per channel for erasing and for writing (arXiv 2605.22791).

        b_t = sigmoid(x_t W_b), w_t = sigmoid(x_t W_w)             per key and per value channel
        S_t = (I - k_t (b_t * k_t)^T) diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
        o_t = S_t^T q_t / sqrt(K)                                  [K, V] per head

    and q, k, v, g and the output as in `KDA`. With b_t = w_t = beta_t this is `KDA`. With
    `negative_eigenvalues` b_t is 2 sigmoid.

    Departures: projections start normal with variance 1/fan_in.

    Parameters: those of `KDA`, with erase_proj [dim, H' * K] and write_proj [dim, H' * V] in place
    of beta_proj.
    State: that of `KDA`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GatedDeltaNet2(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim, heads, head_dim, expand_v, conv_size, value_heads: as in `KDA`.
      decay_bound, low_rank, gate_bias, norm_eps: as in `KDA`.
      negative_eigenvalues: whether b is in (0, 2) instead of (0, 1).
    """

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params = dict(super().declare_params())
        del params["beta_proj"]
        heads = self.memory_heads
        return params | {
            "erase_proj": self._inward(heads * self.key_dim),
            "write_proj": self._inward(heads * self.value_dim),
        }

    def _update(
        self,
        params: Params,
        x: jax.Array,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        decay: tuple[jax.Array, SoftplusGate | None],
        memory: jax.Array,
        context: Context,
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = l2_normalize(qkv[0]), l2_normalize(qkv[1]), qkv[2]
        log_decay, gate = decay
        log_decay = log_decay if gate is None else gate(log_decay)
        wide = state_dtype(x.dtype)
        erase, write = (
            jax.nn.sigmoid(split_heads(dense(x, params[f"{name}_proj"]), self.memory_heads))
            for name in ("erase", "write")
        )
        erase, k = erase.astype(wide), k.astype(wide)
        erased = repeat_heads(k, self.memory_heads)
        if self.negative_eigenvalues:
            erase = 2 * erase
        return generalized_delta_rule(
            q,
            k,
            write * v,
            jnp.exp(log_decay) * erase * erased,
            -k,
            log_decay,
            memory,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
