"""pLSTM over a grid: matrix states on edges, in four orientations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, state_dtype
from seqjax.layers._grid import FOUR, Flips, GridLayer
from seqjax.layers._math import dense, merge_heads, rms_normalize, split_heads
from seqjax.ops.grid.plstm_2d import plstm_2d

# The number of gates of each name and their starts.
_GATES = {
    "P": {"source": (1, -5.0), "transition": (1, 1.0), "mark": (1, -5.0)},
    "D": {"source": (2, -5.0), "transition": (3, 1.0), "mark": (2, -5.0)},
}


@dataclasses.dataclass(frozen=True)
class PLSTM2D(GridLayer):
    """pLSTM over a grid, for images (arXiv 2506.11997).

        q, k, v = x W_q, x W_k, x W_v                          per node and head
        sigma, mu, d = sigmoid(x W + b)                        source, mark and direct gate
        tau = tanh(5 (x W_t + b_t))                            transition
        o = sum over orientations of plstm_2d(q, k, v, s, T, m)  + d (q . k) v / sqrt(K)
        y = rmsnorm(o) W_o

    Each orientation has its own gates. E_0 is the state of edges along X and E_1 of those along Y:

        mode "P", propagation:  alpha = sigmoid(x W_a / (2 dim) + b_a)
                                s = (alpha sigma, (1 - alpha) sigma),  m = (mu, mu)
                                T = [[alpha tau, alpha tau], [(1 - alpha) tau, (1 - alpha) tau]]
        mode "D", diffusion:    s = (sigma_0, sigma_1),  m = (mu_0, mu_1)
                                T = [[tau_0, tau_2], [0, tau_1]]

    In P-mode the angle alpha sends a state in one direction, and the weights of the two edges that
    an edge enters sum to |tau| < 1. In D-mode there is one path between two nodes. Both keep states
    bounded, but `complement=True` does not where tau < 0: T_1j is then above 1. The RMS norm is per
    head, with one scale [K] for all heads. `seqjax.plstm_2d` has the
    recurrence. Alternate both modes in a model, as the paper does.

    Departures: transitions are numbers (J = 1 in the paper). In P-mode the authors' code has
    s_1 = 1 - s_0 and T_1j = 1 - T_0j; `complement=True` selects that form. The authors' code also
    has a convolution before the gates, the queries and the keys, and a norm scale for each head.
    Put a convolution before the layer. Projections of q, k, v and the
    output start normal with variance 1/fan_in.

    Initialization: projections of the gates start at 0, their biases at -5 (source, mark, direct)
    and 1 (transition). b_a is spaced evenly from -2 to 2 over the heads.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], direct_proj [dim, H], direct_bias [H],
    source_proj, transition_proj, mark_proj [dim, O * H * n], source_bias, transition_bias,
    mark_bias [O, H, n] with O orientations and n gates, in P-mode orientation_proj [dim, O * H] and
    orientation_bias [O, H], norm [K], out_proj [H * K, dim].
    State: none. `apply` takes x [B, X, Y, dim]; there is no `step` and there are no resets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = PLSTM2D(dim=8, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, _ = layer.apply(params, jnp.ones((2, 5, 6, 8)))
      >>> y.shape
      (2, 5, 6, 8)

    Attributes:
      dim: features of input and output.
      heads: number of heads H, with K = dim / H features each.
      mode: "P" or "D", as above.
      complement: use the P-mode of the authors' code.
      flips: the orientations: for each, whether it runs backwards along X and along Y. By default
        all four.
      norm_eps: constant added to the mean square in the norm.
    """

    dim: int
    heads: int
    mode: Literal["P", "D"] = "P"
    complement: bool = False
    flips: Flips = FOUR
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _checks.head_dim(self, self.dim, self.heads, None)
        _checks.one_of(self, "mode", self.mode, _GATES)
        _checks.require(
            self,
            not (self.complement and self.mode == "D"),
            "`complement` must be False in mode 'D', got True; it is a form of mode 'P'.",
        )
        self._check_flips()
        _checks.above_zero(self, norm_eps=self.norm_eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, heads, orientations = self.dim, self.heads, len(self.flips)
        inward = Param((dim, dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        params: dict[str, Param | Layer] = {f"{name}_proj": inward for name in "qkv"}

        def gate(name: str, shape: tuple[int, ...], start: Any) -> None:
            axes = tuple("heads" if i == len(shape[:2]) - 1 else None for i in range(len(shape)))
            params[f"{name}_proj"] = Param(
                (dim, math.prod(shape)), ("embed", None), "weight", _init.zeros
            )
            params[f"{name}_bias"] = Param(shape, axes, "recurrence", start)

        constant = jax.nn.initializers.constant
        gate("direct", (heads,), constant(-5.0))
        for name, (count, start) in _GATES[self.mode].items():
            gate(name, (orientations, heads, count), constant(start))
        if self.mode == "P":
            gate("orientation", (orientations, heads), _spaced)
        return params | {
            "norm": Param((dim // heads,), ("head_dim",), "norm", _init.ones),
            "out_proj": Param((dim, dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }

    def state_flops(self) -> int:
        # For both edges two transitions, a write and a read; the outer product of k and v.
        return 18 * len(self.flips) * self.dim * self.dim // self.heads

    def mix(self, params: Params, x: jax.Array) -> jax.Array:
        wide = state_dtype(x.dtype)
        q, k, v = (split_heads(dense(x, params[f"{n}_proj"]), self.heads) for n in "qkv")

        def gate(name: str, factor: float = 1.0) -> jax.Array:
            bias = params[f"{name}_bias"].astype(wide)
            z = dense(x, params[f"{name}_proj"]).astype(wide) * factor
            return z.reshape(*x.shape[:3], *bias.shape) + bias

        sigma, mu = jax.nn.sigmoid(gate("source")), jax.nn.sigmoid(gate("mark"))
        tau = jnp.tanh(5 * gate("transition"))
        if self.mode == "P":
            alpha = jax.nn.sigmoid(gate("orientation", 0.5 / self.dim))[..., None]
            s_0, t_0 = alpha * sigma, alpha * tau
            s_1, t_1 = (1 - alpha) * sigma, (1 - alpha) * tau
            if self.complement:
                s_1, t_1 = 1 - s_0, 1 - t_0
            source, mark = jnp.concatenate([s_0, s_1], -1), jnp.concatenate([mu, mu], -1)
            rows = [[t_0, t_0], [t_1, t_1]]
        else:
            source, mark = sigma, mu
            own_0, own_1, cross = jnp.split(tau, 3, axis=-1)
            rows = [[own_0, cross], [jnp.zeros_like(cross), own_1]]
        transition = jnp.stack([jnp.concatenate(row, -1) for row in rows], axis=-2)
        # The op adds the node's own value in every orientation.
        direct = jax.nn.sigmoid(gate("direct")) / len(self.flips)
        arrays = [self.oriented(z.astype(wide)) for z in (q, k, v)]
        arrays += [self.each_oriented(z) for z in (source, transition, mark)]
        arrays.append(self.oriented(direct))
        o = self.summed(jax.vmap(plstm_2d)(*arrays))
        o = merge_heads(rms_normalize(o, params["norm"], self.norm_eps)).astype(x.dtype)
        return dense(o, params["out_proj"])


def _spaced(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return values from -2 to 2, evenly spaced over the last axis."""
    del key
    return jnp.broadcast_to(jnp.linspace(-2, 2, shape[-1], dtype=dtype), shape)
