"""LSTM: long short-term memory, and its variants."""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure

Variant = Literal["nig", "nfg", "nog", "niaf", "noaf", "cifg", "fgr"]
_MISSING = {"nig": "i", "nfg": "f", "cifg": "f", "nog": "o"}


@dataclasses.dataclass(frozen=True)
class LSTM(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate by Gers et al., 2000).

        i = sigmoid(u_i + h W_i)
        f = sigmoid(u_f + h W_f)
        g = tanh(u_g + h W_g)
        o = sigmoid(u_o + h W_o)
        c' = f * c + i * g
        h' = o * tanh(c')

    `peepholes` adds P_i * c, P_f * c and P_o * c' to the gates i, f and o. `variant` is one of
    those of A search space odyssey (arXiv 1503.04069), whose LSTM has peepholes:

        nig, nfg, nog     no input, forget or output gate: the gate is 1
        niaf              no input activation function: g = u_g + h W_g
        noaf              no output activation function: h' = o * c'
        cifg              coupled input and forget gate: f = 1 - i
        fgr               full gate recurrence: i, f and o also read the three gates of the earlier
                          step, by nine matrices

    `layer_norm` normalizes the recurrent products and the cell (arXiv 1607.06450):

        h W_i, h W_f, h W_g, h W_o  ->  S * norm(h W_i, h W_f, h W_g, h W_o)      as one vector
        tanh(c')                    ->  tanh(S_c * norm(c') + b_c)
        norm(z) = (z - mean(z)) / sqrt(var(z) + norm_eps)

    Departures: the default has none from the form of PyTorch and cuDNN. The paper on layer
    normalization has no norm_eps, so its first step, with h = 0, is undefined. The paper's shifts
    of the products are part of u here. The terms of peepholes and of "fgr" are not normalized.

    Parameters: W_i, W_f, W_g, W_o [D, D], those of missing gates left out; with peepholes P_i, P_f,
    P_o [D]; for "fgr" W_ii, W_if, .., W_oo [D, D] from the first gate to the second; with
    `layer_norm` S_i, S_f, S_g, S_o, S_c, b_c [D]. u [4, D] in the order i, f, g, o, or [3, D]
    without one. State: (c, h) as [D, 2], for "fgr" (c, h, i, f, o) as [D, 5]; a layer reads h.
    Jacobian: dense. Bounds: |h| <= 1, except for "noaf". c is unbounded, because f and i may both
    be near 1 for any number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = LSTM(dim=3)
      >>> params = dict.fromkeys(("W_i", "W_f", "W_g", "W_o"), jnp.eye(3))
      >>> cell(params, jnp.zeros((3, 2)), jnp.ones((4, 3))).shape
      (3, 2)

    Attributes:
      dim: channels D.
      variant: one of the variants above; by default none of them.
      peepholes: whether the gates read the cell c.
      layer_norm: whether the recurrent products and the cell are normalized.
      norm_eps: constant added to the variances, positive.
    """

    dim: int
    variant: Variant | None = None
    peepholes: bool = False
    layer_norm: bool = False
    norm_eps: float = 1e-5
    gates: ClassVar[int] = 4
    width: ClassVar[int] = 2
    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("W_i", "W_f", "W_g", "W_o"), "matrix")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in (None, *get_args(Variant)):
            raise ValueError(
                f"LSTM: `variant` must be one of {', '.join(get_args(Variant))} or None, got"
                f" {self.variant!r}."
            )
        if not self.norm_eps > 0:
            raise ValueError(f"LSTM: `norm_eps` must be above 0, got {self.norm_eps!r}.")
        sigmoids = [name for name in self.names if name != "g"]
        recurrent: dict[str, Literal["vector", "matrix"]] = {
            f"W_{name}": "matrix" for name in self.names
        }
        if self.variant == "fgr":
            recurrent |= {f"W_{old}{new}": "matrix" for old in sigmoids for new in sigmoids}
            object.__setattr__(self, "width", 5)
        if self.peepholes:
            recurrent |= {f"P_{name}": "vector" for name in sigmoids}
        if self.layer_norm:
            recurrent |= {f"S_{name}": "vector" for name in (*self.names, "c")}
            recurrent["b_c"] = "vector"
        object.__setattr__(self, "gates", len(self.names))
        object.__setattr__(self, "recurrent", recurrent)

    @property
    def names(self) -> str:
        """The names of the gates in the order of u."""
        return "ifgo".replace(_MISSING.get(self.variant or "", " "), "")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (c, h) [D, 2] and u [4, D]."""
        c, h, *gates = (h[:, j] for j in range(self.width))
        products = [h @ params[f"W_{name}"] for name in self.names]
        if self.layer_norm:
            normed = self._normalize(jnp.stack(products))
            products = [params[f"S_{n}"] * z for n, z in zip(self.names, normed, strict=True)]
        sums = {name: u[k] + products[k] for k, name in enumerate(self.names)}

        def gate(name: str, c: jax.Array) -> jax.Array:
            if name not in self.names:
                return jnp.ones_like(c)
            before = sums[name]
            for old, value in zip("ifo", gates, strict=False):  # only "fgr" has gates in its state
                before = before + value @ params[f"W_{old}{name}"]
            if self.peepholes:
                before = before + params[f"P_{name}"] * c
            return jax.nn.sigmoid(before)

        i = gate("i", c)
        f = 1 - i if self.variant == "cifg" else gate("f", c)
        g = sums["g"]
        c = f * c + i * (g if self.variant == "niaf" else jnp.tanh(g))
        o = gate("o", c)
        read = params["S_c"] * self._normalize(c) + params["b_c"] if self.layer_norm else c
        h = o * (read if self.variant == "noaf" else jnp.tanh(read))
        return jnp.stack([c, h, *((i, f, o) if gates else ())], axis=-1)

    def _normalize(self, z: jax.Array) -> jax.Array:
        """Return z with mean 0 and variance 1 over all its entries."""
        centered = z - jnp.mean(z)
        return centered * jax.lax.rsqrt(jnp.mean(centered * centered) + self.norm_eps)

    def bounds(self, params: Params) -> Bounds | None:
        """Return no bounds for c, [-1, 1] for h, and [0, 1] for gates."""
        if self.variant == "noaf":
            return None
        dtype = params["W_g"].dtype  # NumPy, because of `jax.debug_infs`
        count = self.width - 2
        low, high = [-np.inf, -1.0, *[0.0] * count], [np.inf, 1.0, *[1.0] * count]
        return np.array(low, dtype), np.array(high, dtype)

    def output(self, h: jax.Array) -> jax.Array:
        """Return h from (c, h)."""
        return h[..., 1]
