"""Mamba-3: a state space with a trapezoidal rule, rotating states and an optional rank above 1."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._delayed import two_point
from seqjax.layers._math import dense, rms_normalize, split_heads
from seqjax.layers._reductions import turn
from seqjax.layers.context import Context
from seqjax.ops.monoid_scan import monoid_scan


@dataclasses.dataclass(frozen=True)
class Mamba3(Layer):
    """Mamba-3 (arXiv 2603.15569), with one input per head (SISO) or several (MIMO).

        dt_t = softplus(x_t W_dt + dt_bias),  A_t = -max(f(x_t W_A), 1e-4)          per head
        a_t = exp(dt_t A_t),  l_t = sigmoid(x_t W_l)
        phi_t = phi_{t-1} + dt_t pi tanh(x_t W_phi)                                 [n] per head
        k_t, q_t = turn(phi_t, rms(x_t W_B) + B_bias), turn(phi_t, rms(x_t W_C) + C_bias)
        S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t k_{t-1} u_{t-1}^T + l_t dt_t k_t u_t^T
        y_t = (S_t^T q_t + D u_t) * silu(x_t W_z)                                   [P] per head
        out_t = y_t W_out

    with u = x W_u [H, P], S [N, P], and G groups of k and q, which serve H / G heads each. turn
    rotates n = rope_fraction * N / 2 pairs of features, (0, 1), (2, 3), ... The function f is
    f(s) = 1 + s for s >= 0 and 1 / (1 - s) below, or the softplus. With `norm`, y_t is divided by
    its root mean square per head before the gate.

    With `mimo_rank` R > 1 every token has R keys, queries and values, and the pairs are
    (i, i + N / 2):

        S_t = a_t S_{t-1} + sum over r of the two writes, with u_t^r = u_t * mimo_x^r
        y_t = sum over r of mimo_o^r * (S_t^T q_t^r + D u_t^r) * silu(x_t W_z * mimo_z^r)

    Every read of a token follows all of its writes. `linear_attention` computes this exactly, on R
    steps for each token and a sum over the R x R pairs of a token.

    softplus(dt_bias) starts log-uniform in [dt_min, dt_max], D, the biases and mimo_z at 1, mimo_x
    and mimo_o at 1 / R.

    Departures: the authors store the projections as one array; here each is a parameter, and starts
    normal with variance 1/fan_in. Angles are counted from the start of each call, and the state is
    rotated back at its end, so the state holds no angle.

    Parameters: in_proj (W_u), gate_proj (W_z) [dim, H * P]; B_proj, C_proj [dim, R * G * N];
    dt_proj, A_proj, trap_proj (W_l) [dim, H]; angle_proj [dim, n]; B_norm, C_norm [N]; B_bias,
    C_bias [H, R, N]; dt_bias, D [H]; out_proj [H * P, dim]; with `norm` norm [H * P]; for R > 1
    mimo_x, mimo_z, mimo_o [H, R, P].
    State: {"memory": [B, H, N, P], "k": [B, R, H, N], "v": [B, R, H, P]}, with the last k and u.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Mamba3(dim=8, state_dim=8, head_dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 4, 8, 4))

    Attributes:
      dim: features of input and output.
      state_dim: states N, an even number.
      head_dim: features per head P.
      heads: number of heads H; by default expand * dim / head_dim.
      expand: features of all heads per feature of the input, if `heads` is None.
      groups: number of groups G of keys and queries, which divides the number of heads.
      mimo_rank: keys, queries and values R for each token and head.
      rope_fraction: share of the states that rotate, 0.5 or 1.
      decay: f, "rational" or "softplus". Weights from before June 2026 need "softplus".
      norm: whether there is a norm before the gate.
      norm_eps: constant added to the mean square in all norms.
      dt_min: smallest dt at initialization.
      dt_max: largest dt at initialization.
    """

    dim: int
    state_dim: int = 128
    head_dim: int = 64
    heads: int | None = None
    expand: float = 2
    groups: int = 1
    mimo_rank: int = 1
    rope_fraction: float = 0.5
    decay: Literal["rational", "softplus"] = "rational"
    norm: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def __post_init__(self) -> None:
        sizes = ("dim", "state_dim", "head_dim", "groups", "mimo_rank")
        _checks.positive(self, **{name: getattr(self, name) for name in sizes})
        heads = self.expand * self.dim / self.head_dim
        if self.heads is not None:
            _checks.positive(self, heads=self.heads)
        _checks.require(
            self,
            self.heads is not None or (heads >= 1 and heads == int(heads)),
            f"`expand` * dim must be a multiple of head_dim, got expand={self.expand},"
            f" dim={self.dim}, head_dim={self.head_dim}; pass another head_dim, or heads.",
        )
        _checks.require(
            self,
            self.head_count % self.groups == 0,
            f"`groups` must divide the number of heads, {self.head_count}, got {self.groups}.",
        )
        _checks.require(
            self,
            self.rope_fraction in (0.5, 1),
            f"`rope_fraction` must be 0.5 or 1, got {self.rope_fraction}.",
        )
        _checks.require(
            self,
            self.state_dim % 2 == 0 and self.angles > 0,
            f"`state_dim` must be even and at least 2 / rope_fraction, got {self.state_dim}.",
        )
        _checks.one_of(self, "decay", self.decay, ("rational", "softplus"))
        _checks.above_zero(self, norm_eps=self.norm_eps)
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )

    @property
    def head_count(self) -> int:
        """Number of heads H: `heads`, by default expand * dim / head_dim."""
        return int(self.expand * self.dim / self.head_dim) if self.heads is None else self.heads

    @property
    def angles(self) -> int:
        """Number of rotating pairs n."""
        return int(self.state_dim * self.rope_fraction) // 2

    def declare_params(self) -> Mapping[str, Param | Layer]:
        heads, inner, rank = self.head_count, self.head_count * self.head_dim, self.mimo_rank
        keys = rank * self.groups * self.state_dim
        widths = {
            "in": (inner, "heads"),
            "gate": (inner, "heads"),
            "B": (keys, None),
            "C": (keys, None),
            "dt": (heads, "heads"),
            "A": (heads, "heads"),
            "trap": (heads, "heads"),
            "angle": (self.angles, None),
        }
        params: dict[str, Param | Layer] = {
            f"{name}_proj": Param((self.dim, width), ("embed", axis), "weight", _init.fan_in_normal)
            for name, (width, axis) in widths.items()
        }
        for name in "BC":
            params[f"{name}_norm"] = Param((self.state_dim,), ("state",), "norm", _init.ones)
            params[f"{name}_bias"] = Param(
                (heads, rank, self.state_dim), ("heads", None, "state"), "recurrence", _init.ones
            )
        params |= {
            "dt_bias": Param(
                (heads,),
                ("heads",),
                "recurrence",
                _init.inverse_softplus_log_uniform(self.dt_min, self.dt_max),
            ),
            "D": Param((heads,), ("heads",), "bias", _init.ones),
            "out_proj": Param((inner, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }
        if self.norm:
            params["norm"] = Param((inner,), ("heads",), "norm", _init.ones)
        if rank > 1:
            share = jax.nn.initializers.constant(1 / rank)
            for name, start in (("x", share), ("z", _init.ones), ("o", share)):
                params[f"mimo_{name}"] = Param(
                    (heads, rank, self.head_dim), ("heads", None, "head_dim"), "bias", start
                )
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        heads, rank = self.head_count, self.mimo_rank
        shapes = {
            "memory": (batch_size, heads, self.state_dim, self.head_dim),
            "k": (batch_size, rank, heads, self.state_dim),
            "v": (batch_size, rank, heads, self.head_dim),
        }
        return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}

    def state_flops(self) -> int:
        # decay 1, write 2 and read 2 for each of the R keys and queries
        return (1 + 4 * self.mimo_rank) * self.head_count * self.state_dim * self.head_dim

    def _keys(self, params: Params, x: jax.Array, name: str) -> jax.Array:
        """Return k ("B") or q ("C") before the rotation, [B, T, R, H, N], in the state dtype."""
        y = dense(x, params[f"{name}_proj"]).astype(state_dtype(x.dtype))
        y = y.reshape(*x.shape[:2], self.mimo_rank, self.groups, self.state_dim)
        y = rms_normalize(y, params[f"{name}_norm"], self.norm_eps)
        y = jnp.repeat(y, self.head_count // self.groups, axis=3)
        y = y + params[f"{name}_bias"].astype(y.dtype).swapaxes(0, 1)
        if self.mimo_rank == 1:  # the pairs (2 i, 2 i + 1) become (i, i + N / 2)
            y = y.reshape(*y.shape[:-1], self.state_dim // 2, 2).swapaxes(-1, -2).reshape(y.shape)
        return y

    def _by_rank(self, x: jax.Array, params: Params, name: str) -> jax.Array:
        """Return x [B, T, H * P] as [B, T, R, H, P], times the factor of each rank."""
        x = split_heads(x, self.head_count)[:, :, None]
        if self.mimo_rank == 1:
            return x
        return x * params[f"mimo_{name}"].astype(x.dtype).swapaxes(0, 1)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)

        def project(name: str) -> jax.Array:
            return dense(x, params[f"{name}_proj"]).astype(wide)

        dt = jax.nn.softplus(project("dt") + params["dt_bias"].astype(wide))
        rate = (_rational if self.decay == "rational" else jax.nn.softplus)(project("A"))
        trap = jax.nn.sigmoid(project("trap"))
        turns = dt[..., None] * (jnp.pi * jnp.tanh(project("angle")))[:, :, None]
        turns = jnp.pad(turns, [(0, 0)] * 3 + [(0, self.state_dim // 2 - self.angles)])
        phases, last = monoid_scan(
            _add_angles, turns, reset=context.reset, sequence_axis=context.sequence_axis
        )
        u = self._by_rank(dense(x, params["in_proj"]), params, "x")
        y, new_state = two_point(
            turn(self._keys(params, x, "C"), phases[:, :, None]),
            turn(self._keys(params, x, "B"), phases[:, :, None]),
            u,
            -dt * jnp.maximum(rate, 1e-4),
            ((1 - trap) * dt, trap * dt),
            state,
            context,
        )
        # Angles of the next call start from 0.
        new_state["k"] = turn(new_state["k"], -last[:, None])
        new_state["memory"] = turn(new_state["memory"].mT, -last[:, :, None]).mT
        y = y.astype(wide) + params["D"].astype(wide)[:, None] * u.astype(wide)
        if self.norm:
            y = rms_normalize(y, split_heads(params["norm"], self.head_count), self.norm_eps)
        y = y * jax.nn.silu(self._by_rank(project("gate"), params, "z"))
        if self.mimo_rank > 1:
            y = y * params["mimo_o"].astype(wide).swapaxes(0, 1)
        y = jnp.sum(y, axis=2).reshape(*x.shape[:2], -1)
        return dense(y.astype(x.dtype), params["out_proj"]), new_state


def _rational(s: jax.Array) -> jax.Array:
    """Return 1 + s for s >= 0, and 1 / (1 - s) below."""
    return jnp.maximum(s, 0) + 1 / (1 - jnp.minimum(s, 0))


def _add_angles(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """Return the sum of two angles in [-pi, pi], so that no digits are lost in long sequences."""
    total = earlier + later
    return total - 2 * math.pi * jnp.round(total / (2 * math.pi))
