"""Chimera: a gated block around a two-dimensional selective state space."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, state_dtype
from seqjax.layers._grid import FOUR, Flips, GridLayer
from seqjax.layers._math import dense
from seqjax.ops.grid.selective_scan_2d import selective_scan_2d


@dataclasses.dataclass(frozen=True)
class Chimera(GridLayer):
    """The two-dimensional selective state space of Chimera (arXiv 2406.04320), in a gated block.

        u, z = silu(x W_u), x W_z                                     [E] per node, E = expand * dim
        dt = softplus(u W_1 W_2 + b),  B = u W_B,  C = u W_C          per orientation and axis
        o = sum over orientations of selective_scan_2d(u, dt, A, B, C)  +  D * u
        y = (o * silu(z)) W_o

    A_00 = -exp(a_0) and A_11 = -exp(a_1) decay along X and along Y. A_01 and A_10 couple the two
    states and are not constrained. `seqjax.selective_scan_2d` has the recurrence. Each orientation
    has its own dt, A, B and C.

    For a multivariate time series, let X be the variates and Y the time. The flips ((False,
    False), (True, False)) are then causal in time and use both directions of the variates, as the
    paper does. For images use all four orientations, the default.

    Departures: the paper has two such modules, for the trend and for seasonal patterns, with
    different step sizes. Here channels start with different step sizes, and a model has several
    layers. The paper's decoder is left out. It gives A along the time a structured form; here all
    A are diagonal. The products with a_pq for p != q are our reading of its step.
    The 2-D SSM of arXiv 2306.06635 has no step sizes, constant A, B and C, real or complex states,
    and halves the sum of both states.

    Initialization: projections normal with variance 1/fan_in; a_p = log(1..N); A_01 and A_10 zero;
    dt log-uniform in [dt_min, dt_max]; D one.

    Parameters: in_proj, gate_proj [dim, E], dt_down [E, R], dt_up [R, O * 2 * E], dt_bias
    [O, 2, E], B_proj, C_proj [E, O * 2 * N], A_log, A_cross [O, 2, E, N], D [E], out_proj
    [E, dim], with O orientations and the rank R = dim / 16, rounded up.
    State: none. `apply` takes x [B, X, Y, dim]; there is no `step` and there are no resets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Chimera(dim=8, state_dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, _ = layer.apply(params, jnp.ones((2, 5, 6, 8)))
      >>> y.shape
      (2, 5, 6, 8)

    Attributes:
      dim: features of input and output.
      state_dim: states per channel and axis N.
      expand: inner features E per feature of the input.
      dt_min, dt_max: range of the initial step sizes.
      flips: the orientations: for each, whether it runs backwards along X and along Y. By default
        all four.
    """

    dim: int
    state_dim: int = 16
    expand: int = 2
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    flips: Flips = FOUR

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim, expand=self.expand)
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )
        self._check_flips()

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, inner, states = self.dim, self.expand * self.dim, self.state_dim
        orientations, rank = len(self.flips), -(-dim // 16)
        weight = _init.fan_in_normal
        inward = Param((dim, inner), ("embed", "mlp"), "weight", weight)
        reading = Param((inner, orientations * 2 * states), ("mlp", None), "weight", weight)
        by_state, axes = (orientations, 2, inner, states), (None, None, "mlp", None)
        return {
            "in_proj": inward,
            "gate_proj": inward,
            "dt_down": Param((inner, rank), ("mlp", None), "weight", weight),
            "dt_up": Param((rank, orientations * 2 * inner), (None, None), "weight", weight),
            "dt_bias": Param(
                (orientations, 2, inner),
                (None, None, "mlp"),
                "recurrence",
                _init.inverse_softplus_log_uniform(self.dt_min, self.dt_max),
            ),
            "B_proj": reading,
            "C_proj": reading,
            "A_log": Param(by_state, axes, "recurrence", _log_counted),
            "A_cross": Param(by_state, axes, "recurrence", _init.zeros),
            "D": Param((inner,), ("mlp",), "bias", _init.ones),
            "out_proj": Param((inner, dim), ("mlp", "embed"), "weight", weight),
        }

    def state_flops(self) -> int:
        # For each axis: the hold 26, exp 1, decays and inputs 7, the output 2.
        return 2 * 36 * len(self.flips) * self.expand * self.dim * self.state_dim

    def mix(self, params: Params, x: jax.Array) -> jax.Array:
        wide, lead, orientations = state_dtype(x.dtype), x.shape[:3], len(self.flips)
        u = jax.nn.silu(dense(x, params["in_proj"]))
        bias = params["dt_bias"].astype(wide)
        dt = dense(dense(u, params["dt_down"]), params["dt_up"]).astype(wide)
        dt = jax.nn.softplus(dt.reshape(*lead, *bias.shape) + bias)
        B, C = (
            dense(u, params[f"{n}_proj"]).astype(wide).reshape(*lead, orientations, 2, -1)
            for n in "BC"
        )
        decays = -jnp.exp(params["A_log"].astype(wide))
        cross = params["A_cross"].astype(wide)
        rows = [[decays[:, 0], cross[:, 0]], [cross[:, 1], decays[:, 1]]]
        A = jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)
        arrays = [self.oriented(u.astype(wide)), self.each_oriented(dt), A]
        arrays += [self.each_oriented(z) for z in (B, C)]
        o = self.summed(jax.vmap(selective_scan_2d)(*arrays)) + params["D"].astype(wide) * u.astype(
            wide
        )
        gate = jax.nn.silu(dense(x, params["gate_proj"]))
        return dense(o.astype(x.dtype) * gate, params["out_proj"])


def _log_counted(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return log(1), ..., log(N) along the last axis."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)
