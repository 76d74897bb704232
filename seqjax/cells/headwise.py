"""Head-wise cells: independent heads, each with a separate recurrent matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cells._base import Bounds, Cell, Params, Structure


@dataclasses.dataclass(frozen=True)
class Headwise(Cell):
    """A cell with block-diagonal recurrent matrices, one block per head.

    Each head of D / H channels is a copy of `cell` with its own parameters, as in the sLSTM of
    xLSTM (arXiv 2405.04517) and FlashRNN (2412.07752). Recurrent weights and their products take
    1 / H of those of full matrices. The Jacobian has one block per head, so that Newton's method
    takes H (k D / H)^3 operations a step, not (k D)^3, for k numbers per channel.

    Parameters: those of `cell`; a matrix [D, D] becomes [H, D / H, D / H], a vector stays [D].
    u [gates, D]. State: [H, k D / H]: for each of the k numbers, that of all channels of the head.
    Jacobian: blocks of that size. Bounds: those of `cell`.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> cell = Headwise(cell=seqjax.cells.Elman(dim=2), heads=3)
      >>> cell({"W": jnp.ones((3, 2, 2))}, jnp.zeros((3, 2)), jnp.ones((1, 6))).shape
      (3, 2)

    Attributes:
      dim: channels D of all heads, which is not an argument.
      cell: the cell of one head, over D / H channels.
      heads: number of heads H.
    """

    dim: int = dataclasses.field(init=False)
    cell: Cell
    heads: int
    structure: ClassVar[Structure] = "block"

    def __post_init__(self) -> None:
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"Headwise: `heads` must be a positive integer, got {self.heads!r}.")
        if isinstance(self.cell, Headwise):
            raise ValueError(
                "Headwise: `cell` must be the cell of one head, got a `Headwise`; pass its cell and"
                " the product of the heads."
            )
        object.__setattr__(self, "dim", self.heads * self.cell.dim)
        for name in ("gates", "width", "recurrent"):
            object.__setattr__(self, name, getattr(self.cell, name))

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from h [H, k D / H] and u [gates, D]."""

        def step(own: Params, h: jax.Array, u: jax.Array) -> jax.Array:
            return self._flat(self.cell(own, self._channels(h), u))

        u = u.reshape(self.gates, self.heads, self.cell.dim)
        return jax.vmap(step, in_axes=(0, 0, 1))(self._by_head(params), h, u)

    def _by_head(self, params: Params) -> Params:
        return {
            name: params[name].reshape(self.heads, *self.cell.param_shape(name))
            for name in self.recurrent
        }

    def _channels(self, h: jax.Array) -> jax.Array:
        """Return states [..., k D / H] of a head as its cell has them: [..., D / H (, k)]."""
        if self.width == 1:
            return h
        return jnp.moveaxis(h.reshape(*h.shape[:-1], self.width, self.cell.dim), -2, -1)

    def _flat(self, h: jax.Array) -> jax.Array:
        return h if self.width == 1 else jnp.moveaxis(h, -1, -2).reshape(*h.shape[:-2], -1)

    def over_heads(self, run: Callable[..., Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Convert `run`, a scan with the cell of one head, to a scan of all heads.

        Both scans are functions of (params, u [B, T, gates, D], state [B, ...], reset [B, T] or
        None) that return all states and the last one.
        """

        def run_all(
            params: Params, u: jax.Array, h: jax.Array, reset: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            u = u.reshape(*u.shape[:-1], self.heads, self.cell.dim)
            by_head = jax.vmap(run, in_axes=(0, 3, 1, None), out_axes=(2, 1))
            states, final = by_head(self._by_head(params), u, self._channels(h), reset)
            return self._flat(states), self._flat(final)

        return run_all

    def param_shape(self, name: str) -> tuple[int, ...]:
        """Return [D] or [H, D / H, D / H]."""
        shape = self.cell.param_shape(name)
        return (self.dim,) if len(shape) == 1 else (self.heads, *shape)

    def initial_state(self, batch_size: int, dtype: Any = jnp.float32) -> jax.Array:
        """Return zeros [batch_size, H, k D / H]."""
        return jnp.zeros((batch_size, self.heads, self.width * self.cell.dim), dtype)

    def bounds(self, params: Params) -> Bounds | None:
        """Return the bounds of the heads' cells, in the layout of the state."""
        heads = self._by_head(params)
        found = self.cell.bounds({name: p[0] for name, p in heads.items()})
        # Constants hold for all numbers. As arrays they would have a dtype, which may not be h's.
        if found is None or all(type(bound) in (int, float) for bound in found):
            return found
        shape = (self.cell.dim, self.width)[: 1 + (self.width > 1)]
        if all(isinstance(bound, np.ndarray | np.generic | int | float) for bound in found):
            # In NumPy as the cell's: an eager array of infinities fails under `jax.debug_infs`.
            rows = (np.broadcast_to(bound, shape).T.reshape(-1) for bound in found)
            low, high = (np.broadcast_to(row, (self.heads, row.size)) for row in rows)
            return low, high

        def of_head(own: Params) -> Bounds:
            found = self.cell.bounds(own)
            assert found is not None
            dtype = jnp.result_type(*found)
            low, high = (self._flat(jnp.broadcast_to(jnp.asarray(b, dtype), shape)) for b in found)
            return low, high

        return jax.vmap(of_head, axis_size=self.heads)(heads)

    def output(self, h: jax.Array) -> jax.Array:
        """Return what the cells of all heads return, next to each other: [..., D]."""
        return self.cell.output(self._channels(h)).reshape(*h.shape[:-2], self.dim)
