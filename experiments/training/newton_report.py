"""How Newton fares inside a model: a `SolveInfo` for every block with a nonlinear RNN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax import SolveInfo
from seqjax.layers import RNN, Layer, Param

Params = dict[str, Any]
State = Any
Report = Callable[[Params, jax.Array, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Watched(Layer):
    """A layer as it is, that adds to its state how it was solved (None: not by Newton).

    A model made of such layers is the same model, with the same parameters, and needs no other
    way to tell what happened inside it.
    """

    layer: Layer
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.layer.dim)

    @property
    def causal(self) -> bool:
        """Whether the layer is."""
        return self.layer.causal

    def _params(self) -> Mapping[str, Param | Layer]:
        return self.layer._params()

    def _initial_state(self, batch_size: int, dtype: Any) -> State:
        return self.layer._initial_state(batch_size, dtype), None

    def _apply(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        info = None
        if by_newton(self.layer):
            assert isinstance(self.layer, RNN)
            info = self.layer.solve_info(params, x, state[0], reset)
        y, after = self.layer._apply(params, x, state[0], reset, sequence_axis)
        return y, (after, info)


def by_newton(layer: Layer) -> bool:
    """Whether the layer solves by Newton on the platform that runs are trained on here."""
    if not isinstance(layer, RNN):
        return False
    return layer.algorithm == "newton" or (
        layer.algorithm is None and jax.default_backend() != "cpu"
    )


def solve_infos(
    model: Any, params: Params, x: jax.Array, reset: jax.Array | None = None
) -> dict[str, SolveInfo]:
    """Runs a model with a backbone and tells how each of its nonlinear RNNs was solved.

    Args:
      model: a `LanguageModel`, or another model that is a frozen dataclass with a `backbone`.
      params: its parameters.
      x: its inputs.
      reset: [B, T] bool.

    Returns:
      `{name of the block: SolveInfo}` for the blocks whose mixer is solved by Newton.
    """
    backbone = model.backbone
    mixers = tuple(Watched(mixer) for mixer in backbone.layers)
    watched = dataclasses.replace(model, backbone=dataclasses.replace(backbone, mixers=mixers))
    _, states = watched.apply(params, x, reset=reset)
    infos = {f"block_{i}": info for i, (_, info) in enumerate(states)}
    return {name: info for name, info in infos.items() if info is not None}


def make_report(model: Any) -> Report | None:
    """Returns `report(params, x, reset) -> numbers for the log`, jitted.

    None if nothing in the model is solved by Newton. `newton_iterations` is the largest number
    over sequences and blocks, `newton_unconverged` how many solves had not converged.
    """
    if not any(map(by_newton, model.backbone.layers)):
        return None

    @jax.jit
    def report(params: Params, x: jax.Array, reset: jax.Array) -> dict[str, jax.Array]:
        infos = list(solve_infos(model, params, x, reset).values())
        return {
            "newton_iterations": jnp.stack([info.iterations for info in infos]).max(),
            "newton_unconverged": jnp.sum(~jnp.stack([info.converged for info in infos])),
        }

    return report
