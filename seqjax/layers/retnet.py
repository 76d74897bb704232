"""RetNet: retention, linear attention with a fixed decay per head and rotated keys."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer, is_integer
from seqjax.layers._reductions import Rotation
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True)
class RetNet(MatrixLayer):
    """Multi-scale retention, RetNet (arXiv 2307.08621).

        q_t, k_t = rotate_t(x_t W_q), rotate_t(x_t W_k)                   per head
        v_t = x_t W_v
        S_t = gamma_h S_{t-1} + k_t v_t^T                                 gamma_h = 1 - 2^(-5-h)
        o_t = S_t^T q_t / sqrt(K)                                         S [K, V], h = 0 .. H - 1
        y_t = (rmsnorm(o_t) * silu(x_t W_g)) W_o

    rotate_t turns the features i and i + K/2 by the angle t * rope_base^(-2i/K). The state contains
    no position: rotations count from the start of a call, and the state is turned back at its end.
    The RMS norm is per head, with one scale [V] for all heads.

    W_o starts Xavier uniform with a gain of 1/2, the other projections with a gain of 2^-2.5.

    Departures: the form is that of flash-linear-attention. The authors' code pairs neighboring
    features, uses rope_base^(-2i/(K-2)), and has no scale in the norm. It divides by sums of decays
    and of scores, which cancel in the norm up to its eps.

    Parameters: q_proj, k_proj [dim, H * K], v_proj, gate_proj [dim, H * V], norm [V], out_proj
    [H * V, dim]. State: {"memory": [B, H, K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RetNet(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 8))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      expand_v: value features of all heads per feature of the input: V = expand_v * dim / H.
      expand_k: the same for keys: K = expand_k * dim / H must be even.
      rope_base: base of the rotary frequencies.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    expand_v: float = 2
    expand_k: float = 1
    rope_base: float = 1e4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self._check_heads()
        _checks.require(
            self,
            is_integer(self.expand_k * self.dim / (2 * self.heads)),
            "`expand_k` * dim must be a multiple of 2 * heads, got"
            f" expand_k={self.expand_k}, dim={self.dim}, heads={self.heads}; rotations need an even"
            " number of features per head.",
        )
        self._check_width("expand_v", self.expand_v * self.dim / self.heads)
        self._check_positive("rope_base", "norm_eps")

    @property
    def key_dim(self) -> int:
        """Key features per head K."""
        return round(self.expand_k * self.dim / self.heads)

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.dim / self.heads)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = _init.xavier_uniform(2**-2.5)
        return {
            **self._qkv(inward),
            "norm": self._head_norm(),
            "gate_proj": self._inward(self.heads * self.value_dim, initializer=inward),
            "out_proj": self._outward(_init.xavier_uniform(0.5)),
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        q, k, v, new_state = self._project(params, x, state, context)
        pairs = np.arange(self.key_dim // 2)
        frequencies = self.rope_base ** (-2.0 * pairs / self.key_dim)
        rotation = Rotation(frequencies.tolist(), x, context.sequence_axis)
        log_decay = np.log1p(-(2.0 ** (-5.0 - np.arange(self.heads))))
        o, memory = linear_attention(
            rotation(q),
            rotation(k),
            v,
            jnp.broadcast_to(
                jnp.asarray(log_decay, state_dtype(x.dtype)), (*x.shape[:2], self.heads)
            ),
            state["memory"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps))
        y = dense(o * jax.nn.silu(dense(x, params["gate_proj"])), params["out_proj"])
        return y, new_state | {"memory": rotation.end(memory)}
