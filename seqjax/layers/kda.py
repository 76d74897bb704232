"""KDA: Kimi Delta Attention, a delta rule memory with a decay per key channel."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.layers._matrix import MatrixLayer, decay_gate, decay_params
from seqjax.layers.context import Context
from seqjax.ops.matrix_state.delta_rule import delta_rule
from seqjax.ops.matrix_state.input_maps import SoftplusGate


@dataclasses.dataclass(frozen=True)
class KDA(MatrixLayer):
    """Kimi Delta Attention (arXiv 2510.26692).

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      per head
        q, k = q / |q|, k / |k|                                    |.|^2 = sum of squares + 1e-6
        beta_t = sigmoid(x_t W_beta)
        g_t = -exp(A_log) softplus(x_t F_1 F_2 + dt_bias)                      per key channel
        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T  [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = (rmsnorm(o_t) * sigmoid(x_t G_1 G_2 + b)) W_o

    The RMS norm is per head, with one scale [V] for all heads. A starts uniform in [1, 16], one per
    head, and softplus of dt_bias log-uniform in [1e-3, 1e-1]. The rank of the projections of decay
    and gate is V. With `decay_bound`, as in Ling 3,

        g_t = decay_bound * sigmoid(exp(A_log) (x_t F_1 F_2 + dt_bias))        A_log starts at 0

    With `value_heads` = M * H, M matrices share the query and the key of a head.

    Departures: projections start normal with variance 1/fan_in.

    Parameters: q_proj, k_proj [dim, H * K], v_proj [dim, H' * V], q_conv, k_conv, v_conv
    (`ShortConv`), beta_proj [dim, H'], decay_down [dim, V], decay_up [V, H' * K], A_log [H'],
    dt_bias [H' * K], gate_down [dim, V], gate_up [V, H' * V], gate_bias [H' * V], norm [V],
    out_proj [H' * V, dim]. Without `low_rank` decay_proj [dim, H' * K] and gate_proj
    [dim, H' * V] in place of the factors. H' is `value_heads`.
    State: {"q_conv", "k_conv", "v_conv": [B, conv_size - 1, H * K or H' * V],
    "memory": [B, H', K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = KDA(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H of q and k.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * K, which must be an integer.
      conv_size: taps of the short convolutions.
      value_heads: number of matrices H', a multiple of H; by default H.
      negative_eigenvalues: whether beta is in (0, 2) instead of (0, 1).
      decay_bound: the most negative g, for the bounded form; None for the other form.
      low_rank: whether the projections of decay and gate have two factors.
      gate_bias: whether the output gate has a bias.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: float = 1
    conv_size: int = 4
    value_heads: int | None = None
    negative_eigenvalues: bool = False
    decay_bound: float | None = None
    low_rank: bool = True
    gate_bias: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        self._check_heads()
        _checks.positive(self, conv_size=self.conv_size)
        self._check_width("expand_v", self.expand_v * self.key_dim)
        self._check_positive("norm_eps")
        if self.decay_bound is not None:
            _checks.require(
                self,
                self.decay_bound < 0,
                f"`decay_bound` must be < 0, got {self.decay_bound}; -5 is usual.",
            )

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return round(self.expand_v * self.key_dim)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        heads = self.memory_heads
        keys, values = heads * self.key_dim, heads * self.value_dim
        params: dict[str, Param | Layer] = {
            **self._qkv(),
            "beta_proj": self._inward(heads),
            **decay_params(heads, keys),
            "norm": self._head_norm(),
            "out_proj": self._outward(),
        }
        if self.decay_bound is not None:
            params["A_log"] = Param((heads,), ("heads",), "recurrence", _init.zeros)
        if self.low_rank:
            params |= self._low_rank("decay", self.value_dim, keys)
            params |= self._low_rank("gate", self.value_dim, values)
        else:
            params |= {"decay_proj": self._inward(keys), "gate_proj": self._inward(values)}
        if self.gate_bias:
            params["gate_bias"] = Param((values,), ("heads",), "bias", _init.zeros)
        return params

    def state_flops(self) -> int:
        heads, keys, values = self.memory_shape
        return 7 * heads * keys * values  # decay 1, read k 2, write 2, read q 2

    def _map(self, name: str, params: Params, x: jax.Array) -> jax.Array:
        """Return the projection of x for the decay or the gate."""
        if self.low_rank:
            return dense(dense(x, params[f"{name}_down"]), params[f"{name}_up"])
        return dense(x, params[f"{name}_proj"])

    def _decay(self, params: Params, dt: jax.Array) -> tuple[jax.Array, SoftplusGate | None]:
        """Return `log_decay` [B, T, H', K] and `gate` for `delta_rule`, from dt [B, T, H' * K]."""
        if self.decay_bound is None:
            return split_heads(dt, self.memory_heads), decay_gate(params, by_channel=True)
        wide = state_dtype(dt.dtype)
        rate = jnp.repeat(jnp.exp(params["A_log"].astype(wide)), self.key_dim)
        gate = jax.nn.sigmoid(rate * (dt.astype(wide) + params["dt_bias"].astype(wide)))
        return split_heads(self.decay_bound * gate, self.memory_heads), None

    def _update(
        self,
        params: Params,
        x: jax.Array,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        decay: tuple[jax.Array, SoftplusGate | None],
        memory: jax.Array,
        context: Context,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the memory, all by head; return its outputs and last state."""
        log_decay, gate = decay
        beta = jax.nn.sigmoid(dense(x, params["beta_proj"]).astype(state_dtype(x.dtype)))
        return delta_rule(
            *qkv,
            2 * beta if self.negative_eigenvalues else beta,
            log_decay,
            memory,
            normalize=True,
            gate=gate,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        q, k, v, new_state = self._project(params, x, state, context)
        decay = self._decay(params, self._map("decay", params, x))
        o, new_state["memory"] = self._update(params, x, (q, k, v), decay, state["memory"], context)
        gate = self._map("gate", params, x)
        if self.gate_bias:
            gate = gate + params["gate_bias"].astype(gate.dtype)
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps))
        return dense(o * jax.nn.sigmoid(gate), params["out_proj"]), new_state
