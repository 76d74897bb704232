"""Flax Linen: any layer or model as a `linen.Module`. Needs the `flax` extra."""

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

    ``variables["params"]`` is the tree that the layer's `init` makes, so that parameters can be
    exchanged with it. State is an argument and a result, not a collection.

    With `partitioned` every parameter is boxed in `linen.LogicallyPartitioned` with the logical
    axes that the layer's `param_axes` names, as `linen.with_logical_partitioning` does:
    ``linen.get_partition_spec``, ``linen.logical_to_mesh_sharding`` and ``linen.scan`` read them
    there and ``linen.unbox`` takes them off. For optimizers that treat parameters by their role
    `layer.param_roles()` is the same tree, of 'weight', 'bias', 'norm', 'embedding' and
    'recurrence'.

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
      layer: any of `seqjax.layers` or `seqjax.models`, or one of your own.
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
        """Declares the parameters, drawn together as the layer's `init` draws them."""
        if not isinstance(self.layer, Layer):
            raise ValueError(
                f"Recurrent: layer must be a seqjax layer or model, given {self.layer!r}; make one,"
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

        # Not `self.param`, which draws each one by itself, and again, abstractly, on every call.
        self._declared = [
            (name, self.variable("params", name, draw, name)) for name in self.layer.param_axes()
        ]

    def __call__(
        self, x: jax.Array, state: Any = None, reset: jax.Array | None = None, **options: Any
    ) -> Any:
        """Runs the layer over whole sequences; see `seqjax.layers.Layer.apply`.

        Args:
          x: what the layer takes, [B, T, dim] or tokens [B, T].
          state: the state an earlier call returned; None starts afresh.
          reset: [B, T] bool, True where the state is cleared before that step.
          **options: what else the layer's `apply` takes by name, such as a classifier's mask.

        Returns:
          `(y, state)`, or y alone with `return_state=False`.

        Raises:
          ValueError: an argument has the wrong structure, shape or dtype.
          NotImplementedError: `state` is given to a layer that is not causal.
        """
        y, state = self.layer.apply(self._arrays(), x, state, reset, **options)
        return (y, state) if self.return_state else y

    def step(
        self, x_t: jax.Array, state: Any, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Takes one step, with [B, dim] or tokens [B]; see `seqjax.layers.Layer.step`."""
        return self.layer.step(self._arrays(), x_t, state, reset)

    @nn.nowrap
    def initial_state(self, batch_size: int, *dtype: Any) -> Any:
        """The state before the first step; see `seqjax.layers.Layer.initial_state`."""
        return self.layer.initial_state(batch_size, *dtype)

    def _arrays(self) -> Any:
        return {name: variable.value for name, variable in self._declared}
