"""Atlas: a memory that learns from a window of tokens, with orthogonalized momentum."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _feature_maps, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import (
    dense,
    l2_normalize,
    merge_heads,
    rms_normalize,
    split_heads,
    wide_dense,
)
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv, qkv_convs
from seqjax.ops.core.linalg import matmul, read
from seqjax.ops.step_scan import step_scan

GATES = {"rate": 0.0, "momentum": 0.0, "forget": -4.0, "context": 0.0}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NORM_EPS = 1e-12  # added to |P|^2: the momentum is zero before the first gradient


@dataclasses.dataclass(frozen=True)
class Atlas(Layer):
    """The memory of Atlas, linear in polynomial features (arXiv 2505.23735).

        q_t, k_t, v_t = silu(conv(x_t W_q)), silu(conv(x_t W_k)), silu(conv(x_t W_v))
        q_t, k_t = phi(q_t / |q_t|), phi(k_t / |k_t|)                   per head, F features
        G_t = sum over the last `window` tokens i <= t of c_i grad_M |M^T k_i - v_i|^2 at M_{t-1}
        P_t = theta_t P_{t-1} + G_t                                     [F, K] per head
        M_t = (1 - alpha_t) M_{t-1} - eta_t NS(P_t)
        y_t = (rmsnorm(M_t^T q_t) * silu(x_t W_g)) W_o

    phi(z) = (a_0, a_1 z, a_2 z_i z_j for i <= j), with factors sqrt(2) for i < j, so that phi(q) .
    phi(k) = a_0^2 + a_1^2 (q . k) + a_2^2 (q . k)^2. The a are learned and start at 1 / sqrt(n!):
    the kernel is then the Taylor series of exp(q . k). NS(P) takes five steps of Newton-Schulz,
    which move the singular values of P / |P| close to 1, with |P| the Frobenius norm:

        X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X

    Gates are numbers per head: eta = base_rate sigmoid, the others sigmoid of x_t w + b. The window
    does not reach over a reset. M_0 is learned.

    NS is nonlinear in P_t at every token, so the layer runs step by step, in recomputed chunks. The
    paper takes gradients at the start of a chunk instead, to compute them in parallel. One token
    costs about 30 times the operations of a linear recurrence of the same state.

    Departures: the memories of the paper are MLPs; here the memory is linear in phi. 1 -
    alpha_t is the paper's alpha_t. A token has the same weight c_i in all windows; the paper's
    depends on the window too. The appendix of the paper has eta inside of the momentum. The
    paper leaves open the range of eta, the forms of the output gate and norm, and all initial
    values.

    Initialization: projections normal with variance 1/fan_in; M_0 normal with variance 1/F; biases
    of the gates 0, and -4 for alpha.

    Parameters: q_proj, k_proj, v_proj, gate_proj [dim, dim], q_conv, k_conv, v_conv (`ShortConv`),
    rate_proj, momentum_proj, forget_proj, context_proj [dim, H], rate_bias, momentum_bias,
    forget_bias, context_bias [H], powers [degree + 1], memory [H, F, K], norm [K], out_proj
    [dim, dim].
    State: {"q_conv", "k_conv", "v_conv", "memory"}. The memory holds "change" [B, H, F, K], the
    difference M_t - M_0, "momentum" [B, H, F, K], and the last `window - 1` tokens: "keys",
    "values" [B, window - 1, H, K] and "weights" [B, window - 1, H], which are zero before a reset.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Atlas(dim=8, heads=2, window=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"]["change"].shape
      ((2, 5, 8), (2, 8), (2, 2, 15, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H, with K = dim / H features each.
      window: tokens whose losses are summed.
      degree: degree of the polynomial features, 1 or 2.
      steps: steps of Newton-Schulz; 0 for plain momentum.
      base_rate: largest learning rate eta.
      conv_size: taps of the short convolutions.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    window: int = 16
    degree: int = 2
    steps: int = 5
    base_rate: float = 0.1
    conv_size: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, window=self.window, conv_size=self.conv_size)
        for name, choices in (("degree", (1, 2)), ("steps", range(100))):
            value = getattr(self, name)
            _checks.require(
                self,
                type(value) is int and value in choices,
                f"`{name}` must be an integer from {choices[0]} to {choices[-1]}, got {value!r}.",
            )
        _checks.above_zero(self, base_rate=self.base_rate, norm_eps=self.norm_eps)

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    @property
    def features(self) -> int:
        """Polynomial features per head F."""
        size = self.head_dim
        return 1 + size + (size * (size + 1) // 2 if self.degree == 2 else 0)

    def _convs(self) -> dict[str, ShortConv]:
        return qkv_convs(self.heads, self.head_dim, self.head_dim, self.conv_size)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        gate = Param((self.dim, self.heads), ("embed", "heads"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {f"{name}_proj": inward for name in "qkv"}
        params |= self._convs()
        for name, start in GATES.items():
            constant = jax.nn.initializers.constant(start)
            params[f"{name}_proj"] = gate
            params[f"{name}_bias"] = Param((self.heads,), ("heads",), "recurrence", constant)
        shape = (self.heads, self.features, self.head_dim)
        return params | {
            "powers": Param((self.degree + 1,), (None,), "recurrence", _taylor_powers),
            "memory": Param(shape, ("heads", None, None), "recurrence", _init.fan_in_normal),
            "norm": Param((self.head_dim,), ("head_dim",), "norm", _init.ones),
            "gate_proj": inward,
            "out_proj": Param(
                (self.dim, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        fresh = self._fresh(dtype)
        memory = jax.tree.map(lambda z: jnp.zeros((batch_size, *z.shape), dtype), fresh)
        return state | {"memory": memory}

    def _fresh(self, dtype: Any) -> State:
        """Return the state of the memory of one sequence before its first token."""
        matrix = jnp.zeros((self.heads, self.features, self.head_dim), dtype)
        tokens = jnp.zeros((self.window - 1, self.heads, self.head_dim), dtype)
        weights = jnp.zeros((self.window - 1, self.heads), dtype)
        return {
            "change": matrix,
            "momentum": matrix,
            "keys": tokens,
            "values": tokens,
            "weights": weights,
        }

    def state_flops(self) -> int:
        rows, columns = self.features, self.head_dim
        small = min(rows, columns)
        # The errors and the gradient of the window, momentum and memory, Newton-Schulz, the read.
        orthogonal = 2 * self.steps * (2 * small + small**2 // max(rows, columns))
        return self.heads * rows * columns * (4 * self.window + 4 + orthogonal + 2)

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
            tokens[name] = jax.nn.sigmoid(wide_dense(x, params[f"{name}_proj"]) + bias)
        learned = {name: params[name].astype(wide) for name in ("memory", "powers")}
        o, new_state["memory"] = step_scan(
            self._step,
            learned,
            tokens,
            state["memory"],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
            chunk_size=16,
        )
        o = merge_heads(rms_normalize(o.astype(x.dtype), params["norm"], self.norm_eps))
        return dense(o * jax.nn.silu(dense(x, params["gate_proj"])), params["out_proj"]), new_state

    def _step(self, learned: Params, state: State, token: Params) -> tuple[State, jax.Array]:
        """Take one step of one sequence: q, k, v [H, K], gates [H]."""
        window = {
            "keys": jnp.concatenate([state["keys"], token["k"][None]]),
            "values": jnp.concatenate([state["values"], token["v"][None]]),
            "weights": jnp.concatenate([state["weights"], token["context"][None]]),
        }
        keys = self._phi(learned["powers"], window["keys"]).swapaxes(0, 1)  # [H, window, F]
        values, weights = window["values"].swapaxes(0, 1), window["weights"].T[..., None]
        memory = learned["memory"] + state["change"]
        error = weights * (matmul(keys, memory) - values)
        gates = {name: token[name][:, None, None] for name in GATES}
        momentum = gates["momentum"] * state["momentum"] + 2 * matmul(keys.mT, error)
        pushed = self.base_rate * gates["rate"] * newton_schulz(momentum, self.steps)
        change = (1 - gates["forget"]) * memory - pushed - learned["memory"]
        o = read(learned["memory"] + change, self._phi(learned["powers"], token["q"]))
        kept = {name: z[1:] for name, z in window.items()}
        return kept | {"change": change, "momentum": momentum}, o

    def _phi(self, powers: jax.Array, z: jax.Array) -> jax.Array:
        parts = [jnp.ones_like(z[..., :1]), z]
        if self.degree == 2:
            parts.append(_feature_maps.pairs(z))
        return jnp.concatenate([powers[n] * part for n, part in enumerate(parts)], axis=-1)


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """Return x [..., I, O] with its singular values moved close to 1; x itself with no steps."""
    if steps == 0:
        return x
    x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True) + _NORM_EPS)
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x  # the smaller of both products
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = matmul(x, x.mT)
        x = a * x + matmul(b * square + c * matmul(square, square), x)
    return x.mT if wide else x


def _taylor_powers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return 1 / sqrt(n!) for n = 0, 1, ..."""
    del key
    return jnp.asarray([math.factorial(n) ** -0.5 for n in range(shape[0])], dtype)
