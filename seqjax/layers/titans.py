"""Titans: a memory that learns by gradient descent with momentum, and forgets."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import (
    dense,
    l2_normalize,
    merge_heads,
    rms_normalize,
    split_heads,
    wide_dense,
)
from seqjax.layers._minibatch import MemoryLayer, Updates
from seqjax.layers._network import Network
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv, qkv_convs
from seqjax.ops.core import explicit_mesh
from seqjax.ops.core.linalg import matmul

GATES = ("rate", "momentum", "forget")
MEMORY = 1  # the place of M in the states: the anchor, the memory and the momentum


@dataclasses.dataclass(frozen=True)
class Titans(MemoryLayer):
    """The neural memory of Titans (arXiv 2501.00663).

        q_t, k_t, v_t = silu(conv(x_t W_q)), silu(conv(x_t W_k)), silu(conv(x_t W_v))
        q_t, k_t = q_t / |q_t|, k_t / |k_t|                           per head
        l_t(M) = |f(M; k_t) - v_t|^2
        P_t = eta_t P_{t-1} - theta_t grad l_t(M_a)                   momentum
        M_t = (1 - alpha_t) M_{t-1} + P_t                             forgetting
        y_t = (rmsnorm(f(M_t; q_t)) * silu(x_t W_g)) W_o

    f(M; z) = z M, or gelu(z M_1) M_2 with `hidden`. The gates are scalars per head: theta =
    base_rate sigmoid(x_t w + c), eta and alpha = sigmoid(x_t w + c). M_a is the memory at the start
    of the mini-batch, and M_0 is learned. A mini-batch begins at the start of a sequence and at
    every reset. The RMS norm is per head, with one scale [K] for all heads. gelu is the tanh
    approximation.

    The layer is the long-term memory alone. `recall` reads it without learning. The guide on
    adding recurrences builds the paper's three models from it: memory as a layer, as a gate and as
    context (MAL, MAG, MAC).

    Departures: the paper leaves open the range of theta, the form of the output gate and norm, and
    all initial values. A mini-batch sums its gradients, so `base_rate` below 1/mini_batch keeps the
    descent stable. The paper's memories are deeper networks in part; here they have one or two
    layers, without biases.

    Cost: a mini-batch may start anywhere, so gradients are computed twice. The backward pass
    stores one state per mini-batch.

    Initialization: projections and M_0 normal with variance 1/fan_in; biases of the gates 0 for
    theta and eta, -4 for alpha.

    Parameters: q_proj, k_proj, v_proj, gate_proj [dim, dim], q_conv, k_conv, v_conv (`ShortConv`),
    rate_proj, momentum_proj, forget_proj [dim, H], rate_bias, momentum_bias, forget_bias [H], W1
    [H, K, K] (with `hidden` W1 [H, K, hidden], W2 [H, hidden, K]), norm [K], out_proj [dim, dim].
    State: {"q_conv", "k_conv", "v_conv", "memory"}. The memory holds "start" [B, H, 3], the
    multiples of M_0 in M_a, M_t and P_t, "change" (for each matrix [B, H, 3, I, O], the
    differences of M_a, M_t and P_t from these multiples), and "index" [B] (tokens of the
    mini-batch so far).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Titans(dim=8, heads=2, mini_batch=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"]["index"].tolist()
      ((2, 5, 8), (2, 8), [2.0, 2.0])

    Attributes:
      dim: features of input and output.
      heads: number of heads H, with K = dim / H features each.
      hidden: hidden features of the memory of each head; by default the memory is linear.
      mini_batch: tokens in a mini-batch.
      base_rate: largest learning rate theta.
      conv_size: taps of the short convolutions.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    hidden: int | None = None
    mini_batch: int = 16
    base_rate: float = 0.05
    conv_size: int = 4
    norm_eps: float = 1e-6

    _fresh: ClassVar[tuple[float, ...]] = (1.0, 1.0, 0.0)
    _kept: ClassVar[tuple[float, ...]] = (1.0, 1.0)

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, mini_batch=self.mini_batch, conv_size=self.conv_size)
        if self.hidden is not None:
            _checks.positive(self, hidden=self.hidden)
        _checks.above_zero(self, base_rate=self.base_rate, norm_eps=self.norm_eps)

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    @property
    def network(self) -> Network:
        inner = () if self.hidden is None else (self.hidden,)
        return Network(self.heads, (self.head_dim, *inner, self.head_dim), bias=False)

    def _convs(self) -> dict[str, ShortConv]:
        return qkv_convs(self.heads, self.head_dim, self.head_dim, self.conv_size)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        gate = Param((self.dim, self.heads), ("embed", "heads"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {
            "q_proj": inward,
            "k_proj": inward,
            "v_proj": inward,
            **self._convs(),
        }
        for name in GATES:
            start = jax.nn.initializers.constant(-4.0) if name == "forget" else _init.zeros
            params[f"{name}_proj"] = gate
            params[f"{name}_bias"] = Param((self.heads,), ("heads",), "recurrence", start)
        return params | {
            **self.network.declare_params(_init.fan_in_normal),
            "norm": Param((self.head_dim,), ("head_dim",), "norm", _init.ones),
            "gate_proj": inward,
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        return state | {"memory": self.memory_state(batch_size, dtype)}

    def updates(self, params: Params, tokens: Mapping[str, jax.Array], index: jax.Array) -> Updates:
        rate, momentum, forget = (jax.nn.sigmoid(tokens[name]) for name in GATES)
        zero, one, rate = jnp.zeros_like(rate), jnp.ones_like(rate), self.base_rate * rate
        rows = [[one, zero, zero], [zero, 1 - forget, momentum], [zero, zero, momentum]]
        return Updates(
            q=tokens["q"],
            k=tokens["k"],
            v=tokens["v"],
            write=jnp.stack([zero, -rate, -rate], axis=-1),
            read=jnp.stack([zero, one, zero], axis=-1),
            transition=jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2),
        )

    def inner_loss(self, params: Params, y: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(y - v))

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide, new_state, tokens = state_dtype(x.dtype), {}, {}
        for (name, conv), token in zip(self._convs().items(), "qkv", strict=True):
            y = dense(x, params[f"{token}_proj"])
            y, new_state[name] = conv.forward(params[name], y, state[name], context)
            y = split_heads(y.astype(wide), self.heads)
            tokens[token] = y if token == "v" else l2_normalize(y)
        for name in GATES:
            bias = params[f"{name}_bias"].astype(wide)
            tokens[name] = wide_dense(x, params[f"{name}_proj"]) + bias
        o, new_state["memory"] = self.scan_memory(params, tokens, state["memory"], context)
        return self._output(params, x, o), new_state

    @explicit_mesh.auto_inside(
        lambda arguments, _: explicit_mesh.joined(*explicit_mesh.spec_of(arguments["x"]))
    )
    def recall(self, params: Params, x: jax.Array, state: State) -> jax.Array:
        """Return f(M; q_t), normalized and gated, for the memory M of `state`, without learning.

        Args:
          params: the tree that `init` returned.
          x: [B, T, dim].
          state: a state that `apply`, `step` or `initial_state` returned. It is not changed.

        Returns:
          y [B, T, dim].

        Raises:
          ValueError: if an argument has the wrong structure, shape or dtype.
        """
        x = _checks.array(self, "x", x)
        if state is None:
            raise ValueError(
                f"{type(self).__name__}: `state` must be the state to read, got None; start from"
                " layer.initial_state(batch_size, x.dtype)."
            )
        self._check_call(params, x, state, None, one_step=False)
        wide = state_dtype(x.dtype)
        q = dense(x, params["q_proj"])
        q, _ = self._convs()["q_conv"].forward(params["q_conv"], q, state["q_conv"], Context())
        q = jnp.moveaxis(l2_normalize(split_heads(q.astype(wide), self.heads)), 1, 2)
        start = state["memory"]["start"][:, :, MEMORY, None, None]
        weights = [
            start * learned + change[:, :, MEMORY]
            for learned, change in zip(
                self.network.weights(params, wide), state["memory"]["change"], strict=True
            )
        ]
        o, _ = self.network(lambda i, z: matmul(z, weights[i]), q)
        return self._output(params, x, jnp.moveaxis(o, 2, 1))

    def _output(self, params: Params, x: jax.Array, o: jax.Array) -> jax.Array:
        o = merge_heads(rms_normalize(o.astype(x.dtype), params["norm"], self.norm_eps))
        return dense(o * jax.nn.silu(dense(x, params["gate_proj"])), params["out_proj"])
