"""Row of a layer, made from its hyperparameters and its oracle."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.contract.case import Arrays, Case, normal


def layer_case(layer: Any, oracle: Callable[..., Any], name: str | None = None) -> Case:
    """Return the row of a layer, with noise on its parameters so that none is at a special value.

    Args:
      layer: the layer.
      oracle: (layer, params, x, reset) -> outputs.
      name: name of the row; by default that of the class.
    """
    init = jax.jit(lambda key: layer.init(key, jnp.float64))

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        with jax.enable_x64(True):
            params = init(jax.random.key(rng.integers(2**31)))
        params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape), params)
        return {"params": params, "x": normal(rng, batch, length, layer.dim)}

    def run(inputs: Arrays, state: Any, reset: Any) -> Any:
        return layer.apply(inputs["params"], inputs["x"], state, reset)

    def judge(inputs: Arrays, state: None, reset: Any) -> tuple[Any, None]:
        return oracle(layer, inputs["params"], inputs["x"], reset), None

    return Case(
        name=name or type(layer).__name__,
        inputs=make,
        run=run,
        oracle=judge,
        algorithms=(None,),
        timed=("x",),
        split_axis=False,
        layer=layer,
    )
