"""Flax Linen adapter: any layer or model as a `linen.Module`. Requires the `flax` extra."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import Layer

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "seqjax.linen needs Flax, which is not installed: pip install -e '.[flax]' from a clone."
    ) from error


class Recurrent(nn.Module):
    """A seqjax layer or model as a Flax Linen module.

        y, state = module.apply(variables, x, state, reset)     as layer.apply(params, ...)

    ``variables["params"]`` is the tree that the layer's `init` returns, so parameters can be
    exchanged between the two. State is an argument and a result, not a collection.

    With `partitioned` every parameter is boxed in `linen.LogicallyPartitioned` with the logical
    axes from the layer's `param_axes`, as `linen.with_logical_partitioning` does.
    ``linen.get_partition_spec``, ``linen.logical_to_mesh_sharding`` and ``linen.scan`` read the
    boxes, and ``linen.unbox`` removes them. `layer.param_roles()` is the same tree with the role of
    each parameter ('weight', 'bias', 'norm', 'embedding' or 'recurrence'), for optimizers that
    treat roles differently.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU
      >>> from seqjax.linen import Recurrent
      >>> module = Recurrent(LRU(dim=8))
      >>> x = jnp.ones((2, 5, 8))
      >>> variables = module.init(jax.random.key(0), x)
      >>> y, state = module.apply(variables, x)
      >>> y_next, state = module.apply(variables, x[:, 0], state, method="step")
      >>> y.shape, y_next.shape, variables["params"]["B"].names
      ((2, 5, 8), (2, 8), (None, 'embed', 'state'))

    Attributes:
      layer: any of `seqjax.layers` or `seqjax.models`, or your own layer.
      param_dtype: dtype of the parameters; those of a recurrence are at least float32.
      partitioned: whether parameters carry their logical axes.
      return_state: whether a call returns `(y, state)`; with False it returns y alone, as
        `linen.Sequential` requires.
    """

    layer: Layer
    param_dtype: Any = jnp.float32
    partitioned: bool = True
    return_state: bool = True

    def setup(self) -> None:
        """Declare the parameters, drawn together by the layer's `init`."""
        if not isinstance(self.layer, Layer):
            raise ValueError(
                f"Recurrent: `layer` must be a seqjax layer or model, got {self.layer!r}; make one,"
                " e.g. seqjax.layers.DeltaNet(dim=256, heads=4)."
            )
        drawn: dict[str, Any] = {}

        def draw(name: str) -> Any:
            if not drawn:
                drawn.update(self.layer.init(self.make_rng("params"), self.param_dtype))
                if self.partitioned:
                    boxed = jax.tree.map(nn.LogicallyPartitioned, drawn, self.layer.param_axes())
                    drawn.update(boxed)
            return drawn[name]

        # Not `self.param`, which draws each parameter separately and traces the draw in every call.
        self._declared = [
            (name, self.variable("params", name, draw, name)) for name in self.layer.param_axes()
        ]

    def __call__(
        self, x: jax.Array, state: Any = None, reset: jax.Array | None = None, **options: Any
    ) -> Any:
        """Run the layer over whole sequences; see `seqjax.layers.Layer.apply`.

        Args:
          x: the layer's input, [B, T, dim] or tokens [B, T].
          state: the state that an earlier call returned; by default the initial state.
          reset: [B, T] bool, True where the state is cleared before that step.
          **options: further keywords of the layer's `apply`, such as a classifier's mask.

        Returns:
          `(y, state)`, or y alone with `return_state=False`.

        Raises:
          ValueError: if an argument has the wrong structure, shape or dtype.
          NotImplementedError: if `state` is given and the layer is not causal.
        """
        y, state = self.layer.apply(self._arrays(), x, state, reset, **options)
        return (y, state) if self.return_state else y

    def step(
        self, x_t: jax.Array, state: Any, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Take one step, with [B, dim] or tokens [B]; see `seqjax.layers.Layer.step`."""
        return self.layer.step(self._arrays(), x_t, state, reset)

    @nn.nowrap
    def initial_state(self, batch_size: int, *dtype: Any) -> Any:
        """Return the state before the first step; see `seqjax.layers.Layer.initial_state`."""
        return self.layer.initial_state(batch_size, *dtype)

    def _arrays(self) -> Any:
        return {name: variable.value for name, variable in self._declared}
