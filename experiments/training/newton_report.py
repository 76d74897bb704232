"""Convergence of Newton inside a model: a `SolveInfo` for every nonlinear RNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax import SolveInfo
from seqjax.layers import RNN, Layer

Params = dict[str, Any]
Report = Callable[[Params, jax.Array, jax.Array], dict[str, jax.Array]]


def uses_newton(layer: Layer) -> bool:
    """Return whether the layer is an RNN that uses Newton on the default backend."""
    if not isinstance(layer, RNN):
        return False
    return layer.algorithm == "newton" or (
        layer.algorithm is None and jax.default_backend() != "cpu"
    )


def solve_infos(
    model: Any, params: Params, x: jax.Array, reset: jax.Array | None = None
) -> dict[str, SolveInfo]:
    """Run a model with a backbone and return the `SolveInfo` of its nonlinear RNNs.

    Args:
      model: a `LanguageModel`, or another model with a `backbone`.

      params: the model's parameters.

      x: the model's inputs.

      reset: [B, T] bool.

    Returns:
      `{name of the block: SolveInfo}` for the blocks with a mixer that uses Newton.
    """
    _, _, aux = model.apply_with_aux(params, x, reset=reset)
    infos = {}
    for i, block in enumerate(model.backbone.stack):
        for name, mixer in block.mixers.items():
            if uses_newton(mixer):
                infos[f"block_{i}"] = aux[f"block_{i}/{name}/solve"]
    return infos


def make_report(model: Any) -> Report | None:
    """Return the jitted function `report(params, x, reset) -> numbers for the log`.

    Returns None if no layer of the model uses Newton. `newton_iterations` is the maximum over
    sequences and blocks, `newton_unconverged` the number of unconverged solves.
    """
    mixers = [mixer for block in model.backbone.stack for mixer in block.mixers.values()]
    if not any(map(uses_newton, mixers)):
        return None

    @jax.jit
    def report(params: Params, x: jax.Array, reset: jax.Array) -> dict[str, jax.Array]:
        infos = list(solve_infos(model, params, x, reset).values())
        return {
            "newton_iterations": jnp.stack([info.iterations for info in infos]).max(),
            "newton_unconverged": jnp.sum(~jnp.stack([info.converged for info in infos])),
        }

    return report
