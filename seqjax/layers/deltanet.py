"""DeltaNet, plain and gated, and DeltaProduct: a matrix memory corrected by the delta rule."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax

from seqjax.layers import _checks, _feature_maps
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize
from seqjax.layers._matrix import MatrixLayer, decay_gate, decay_params, is_integer
from seqjax.layers._reductions import at_substep
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.delta_rule import delta_rule

_MAPS = ("elu", "relu", "softmax", "dpfp")


@dataclasses.dataclass(frozen=True)
class DeltaNet(MatrixLayer):
    """Delta rule memory, DeltaNet (2406.06484) or with `gated` Gated DeltaNet (2412.06464).

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      per head
        q, k = q / |q|, k / |k|                                    |.|^2 = sum of squares + 1e-6
        beta_t = sigmoid(x_t W_beta)
        alpha_t = exp(-exp(A_log) softplus(x_t W_a + dt_bias))                 gated, otherwise 1
        S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T        [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = (rmsnorm(o_t) * silu(x_t W_g)) W_o                               gate if output_gate

    With `negative_eigenvalues=True` beta is 2 sigmoid, so that I - beta k k^T has eigenvalues in
    [-1, 1] and the layer can solve state tracking tasks such as parity (arXiv 2411.12537). The RMS
    norm is per head, with one scale [V] for all heads. A starts uniform in [1, 16] and softplus of
    dt_bias log-uniform in [1e-3, 1e-1], as in Mamba-2; projections normal with variance 1/fan_in.

    With `value_heads` = M * H, as in Qwen3-Next, M matrices share the query and the key of a head:
    v, beta, alpha and the gate have M * H heads, and matrix h uses the query of head h // M.

    With a `feature_map` phi, the layer is a fast weight programmer (arXiv 2102.11174): q and k are
    phi(conv(x W)) over the sum of its features plus 1e-6, and o_t = S_t^T q_t. The map "dpfp" makes
    2 * dpfp_order * K features, r * roll(r, j) for j = 1 .. dpfp_order with r = relu([x, -x]). The
    memory then has as many rows.

    Departures: the authors' default expand_v for Gated DeltaNet is 2; here it is 1 for both. Fast
    weight programmers have no convolutions; use `conv_size=1` for a factor per channel.

    Parameters: q_proj, k_proj [dim, H * K], v_proj [dim, H' * V], q_conv, k_conv, v_conv
    (`ShortConv`), beta_proj [dim, H'], norm [V], out_proj [H' * V, dim]; if gated a_proj [dim, H'],
    A_log, dt_bias [H']; if output_gate gate_proj [dim, H' * V]. H' is `value_heads`.
    State: {"q_conv", "k_conv", "v_conv": [B, conv_size - 1, H * K or H' * V],
    "memory": [B, H', K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = DeltaNet(dim=8, heads=2, gated=True)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * K, which must be an integer.
      conv_size: taps of the short convolutions.
      gated: whether the memory decays, by alpha.
      negative_eigenvalues: whether beta is in (0, 2) instead of (0, 1).
      output_gate: whether to gate the output; by default the value of `gated`, as in the papers.
      value_heads: number of matrices H', a multiple of H; by default H.
      feature_map: "elu", "relu", "softmax" or "dpfp", in place of silu and the division by |q| and
        |k|; None for those.
      dpfp_order: rotations of the map "dpfp".
      norm_eps: constant added to the mean square in the norm of the output.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: float = 1
    conv_size: int = 4
    gated: bool = False
    negative_eigenvalues: bool = False
    output_gate: bool | None = None
    value_heads: int | None = None
    feature_map: Literal["elu", "relu", "softmax", "dpfp"] | None = None
    dpfp_order: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        head_dim = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_heads()
        _checks.positive(self, conv_size=self.conv_size, dpfp_order=self.dpfp_order)
        self._check_positive("norm_eps")
        if self.feature_map is not None:
            _checks.one_of(self, "feature_map", self.feature_map, _MAPS)
        value_dim = self.expand_v * head_dim
        _checks.require(
            self,
            is_integer(value_dim),
            f"`expand_v` * head_dim must be an integer >= 1, got expand_v={self.expand_v},"
            f" head_dim={head_dim}.",
        )

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def gates_output(self) -> bool:
        """Value of `output_gate`, by default `gated`."""
        return self.gated if self.output_gate is None else self.output_gate

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.key_dim)

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the matrices of one sequence: heads, features of the keys, V."""
        keys = self.key_dim
        if self.feature_map is not None:
            keys = _feature_maps.width(self.feature_map, keys, self.dpfp_order)
        return self.memory_heads, keys, self.value_dim

    def _activation(self, name: str) -> Literal["silu"] | None:
        return "silu" if self.feature_map is None or name == "v" else None

    def declare_params(self) -> Mapping[str, Param | Layer]:
        heads = self.memory_heads
        params: dict[str, Param | Layer] = {
            **self._qkv(),
            "beta_proj": self._inward(self.updates * heads),
            "norm": self._head_norm(),
            "out_proj": self._outward(),
        }
        if self.gated:
            params |= {"a_proj": self._inward(heads), **decay_params(heads)}
        if self.gates_output:
            params["gate_proj"] = self._inward(heads * self.value_dim)
        return params

    def state_flops(self) -> int:
        heads, keys, values = self.memory_shape
        # Read k and write for each update, read q, and the decay.
        return (4 * self.updates + (3 if self.gated else 2)) * heads * keys * values

    def _mapped(self, x: jax.Array) -> jax.Array:
        """Return queries or keys by head as the memory uses them."""
        if self.feature_map is None:
            return x  # `delta_rule` normalizes
        made = _feature_maps.features(self.feature_map, x, self.dpfp_order)
        return _feature_maps.sum_normalize(made).astype(x.dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        batch, length = x.shape[:2]
        count, reset = self.updates, context.reset
        q, k, v, new_state = self._project(params, x, state, context)
        beta = jax.nn.sigmoid(dense(x, params["beta_proj"]).astype(state_dtype(x.dtype)))
        if self.negative_eigenvalues:
            beta = 2 * beta
        decay = dense(x, params["a_proj"]) if self.gated else None
        gate = decay_gate(params) if self.gated else None
        q = self._mapped(q)
        if count > 1:  # one step of the op for each update, of which the first decays
            if decay is not None and gate is not None:
                decay, gate = gate(decay), None
            q = at_substep(q, count, count - 1)
            k, v, beta = (
                z.reshape(batch, length * count, z.shape[2] // count, *z.shape[3:])
                for z in (k, v, beta)
            )
            decay, reset = (None if z is None else at_substep(z, count, 0) for z in (decay, reset))
        o, new_state["memory"] = delta_rule(
            q,
            self._mapped(k),
            v,
            beta,
            decay,
            state["memory"],
            scale=None if self.feature_map is None else 1.0,
            normalize=self.feature_map is None,
            gate=gate,
            reset=reset,
            sequence_axis=context.sequence_axis,
        )
        o = o[:, count - 1 :: count]
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps))
        if self.gates_output:
            o = o * jax.nn.silu(dense(x, params["gate_proj"]))
        return dense(o, params["out_proj"]), new_state


@dataclasses.dataclass(frozen=True)
class DeltaProduct(DeltaNet):
    """Delta rule memory with several updates for each token, DeltaProduct (arXiv 2502.10297).

        S_t^0 = alpha_t S_{t-1}
        S_t^j = (I - beta_t^j k_t^j (k_t^j)^T) S_t^(j-1) + beta_t^j k_t^j (v_t^j)^T
        S_t = S_t^n,   j = 1 .. n                                              [K, V] per head
        o_t = S_t^T q_t / sqrt(K)

    and the rest as in `DeltaNet`. The product of n reflections can rotate, so the layer solves
    state tracking tasks that one update cannot. beta is 2 sigmoid by default.

    `delta_rule` runs on n * T steps, one for each update, so a token costs n times that of
    `DeltaNet`. The result is exact: the decay is that of the first of these steps, and only the
    last one has a query.

    Parameters: those of `DeltaNet`, with k_proj [dim, n * H * K], v_proj [dim, n * H' * V],
    beta_proj [dim, n * H'] and the convolutions of k and v; the update j comes first. State: that
    of `DeltaNet`, with these convolutions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = DeltaProduct(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim, heads, head_dim, expand_v, conv_size, output_gate: as in `DeltaNet`.
      value_heads, feature_map, dpfp_order, norm_eps: as in `DeltaNet`.
      gated: whether the memory decays, by alpha, before the first update of a token.
      negative_eigenvalues: whether beta is in (0, 2) instead of (0, 1).
      updates: number of updates n.
    """

    gated: bool = True
    negative_eigenvalues: bool = True
    updates: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(self, updates=self.updates)
