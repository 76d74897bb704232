"""Language models whose projections are stored in int8, with qwix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.base.errors import UserError
from seqjax.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class Int8Model(LanguageModel):
    """A `LanguageModel` that takes the parameters that `quantize` returns.

    Call `apply` and `step` inside `jax.jit`, as `seqjax.generate` does. Both dequantize the
    projections to their original dtype, and multiply in that dtype.
    """

    def apply(self, params: Any, *arguments: Any, **keywords: Any) -> Any:
        """Return logits and state, as `LanguageModel.apply`."""
        return super().apply(dequantize(params), *arguments, **keywords)

    def step(
        self,
        params: Any,
        x_t: jax.Array,
        state: Any,
        reset: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return logits and state of one token, as `LanguageModel.step`."""
        # Without a barrier, the compiler may make all arrays before the loop over tokens.
        params, x_t = jax.lax.optimization_barrier((params, x_t))
        return super().step(dequantize(params), x_t, state, reset, key=key)


def of_model(model: LanguageModel) -> Int8Model:
    """Return the model that takes parameters in int8."""
    fields = (field.name for field in dataclasses.fields(LanguageModel) if field.init)
    return Int8Model(**{name: getattr(model, name) for name in fields})


def quantize(params: Any) -> Any:
    """Return parameters with projections in int8.

    The projections are the parameters whose name ends with `_proj`. Each output feature has its own
    scale, and so has each block if blocks are stacked.

    Raises:
      UserError: if the package qwix is missing.
    """
    qwix = _qwix()

    def leaf(path: Any, value: jax.Array) -> Any:
        if not path[-1].key.endswith("_proj"):
            return value
        kept = [axis for axis in range(value.ndim) if axis != value.ndim - 2]
        return qwix.quantize(value, jnp.int8, channelwise_axes=kept)

    return jax.tree_util.tree_map_with_path(leaf, params)


def dequantize(params: Any) -> Any:
    """Return the parameters as arrays."""
    qwix = _qwix()

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, qwix.QArray)

    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError("--int8: qwix must be installed; run pip install qwix") from None
    return qwix
