"""Flax NNX adapter: any layer or model as an `nnx.Module`. Requires the `flax` extra."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import Layer

try:
    from flax import nnx
    from flax.core.spmd import get_logical_axis_rules
except ImportError as error:
    raise ImportError(
        "seqjax.nnx needs Flax, which is not installed: pip install -e '.[flax]' from a clone."
    ) from error

Rules = Mapping[str, Any] | Iterable[tuple[str, Any]]


class Recurrent(nnx.Module):
    """A seqjax layer or model as a Flax NNX module.

        y, state = module(x, state, reset)     as layer.apply(params, ...)

    Every parameter is an `nnx.Param` in the layer's tree, `module.params`, where NNX's
    transformations, optimizers, filters and checkpoints find it. Its `tag` is its role ('weight',
    'bias', 'norm', 'embedding' or 'recurrence'). NNX accepts roles as filters, as in
    ``nnx.state(module, "recurrence")``. Its `out_sharding` is the tuple of logical axes from the
    layer's `param_axes`. State is an argument and a result, and is never stored in the module.

    As everywhere in NNX, parameters that are created while a mesh is set are sharded over it
    immediately. `sharding_rules` map logical axes to mesh axes. By default the rules come from the
    enclosing ``nnx.logical_axis_rules``, which must then name every logical axis. Without a mesh
    the logical axes are only names.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from seqjax.layers import LRU
      >>> from seqjax.nnx import Recurrent
      >>> module = Recurrent(LRU(dim=8), rngs=nnx.Rngs(0))
      >>> y, state = module(jnp.ones((2, 5, 8)))
      >>> y_next, state = module.step(jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, module.params["B"].out_sharding
      ((2, 5, 8), (2, 8), (None, 'embed', 'state'))

    Attributes:
      layer: the layer.
      return_state: whether a call returns the state.
      params: the parameters: the tree that `layer.init` returns, with `nnx.Param` leaves.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        sharding_rules: Rules | None = None,
        return_state: bool = True,
    ) -> None:
        """Draw the parameters with the key that ``rngs.params()`` returns.

        Args:
          layer: any of `seqjax.layers` or `seqjax.models`, or your own layer.
          rngs: `nnx.Rngs`.
          param_dtype: dtype of the parameters; those of a recurrence are at least float32.
          sharding_rules: logical axis -> mesh axis. Axes without a rule are not split. If two axes
            of a parameter map to the same mesh axis, the first one is split. By default Flax's
            rules apply.
          return_state: whether a call returns `(y, state)`; with False it returns y alone, as
            `nnx.Sequential` requires.

        Raises:
          ValueError: if `layer` or `rngs` has the wrong type, or a mesh is set and a logical axis
            has no rule.
        """
        if not isinstance(layer, Layer):
            raise ValueError(
                f"Recurrent: `layer` must be a seqjax layer or model, got {layer!r}; make one, e.g."
                " seqjax.layers.DeltaNet(dim=256, heads=4)."
            )
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(
                f"Recurrent: `rngs` must be an nnx.Rngs, got {type(rngs).__name__}; pass"
                " rngs=nnx.Rngs(0)."
            )
        self.layer = layer
        self.return_state = return_state
        rules = None if sharding_rules is None else dict(sharding_rules)
        # Flax rejects axis names without a mesh, unless eager sharding is off.
        eager = nnx.using_eager_sharding() and not jax.sharding.get_abstract_mesh().empty
        if eager and rules is None:
            _require_rules(layer)

        def variable(value: jax.Array, axes: tuple[str | None, ...], role: str) -> nnx.Param:
            own = {} if rules is None else {"sharding_rules": _rules_of(axes, rules)}
            metadata: dict[str, Any] = {"out_sharding": axes, "tag": role, **own}
            return nnx.Param(value, eager_sharding=eager, **metadata)

        self.params = nnx.data(
            jax.tree.map(
                variable,
                layer.init(rngs.params(), param_dtype),
                layer.param_axes(),
                layer.param_roles(),
            )
        )

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

    def initial_state(self, batch_size: int, *dtype: Any) -> Any:
        """Return the state before the first step; see `seqjax.layers.Layer.initial_state`."""
        return self.layer.initial_state(batch_size, *dtype)

    def _arrays(self) -> Any:
        return jax.tree.map(
            lambda variable: variable[...],
            self.params,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )


def _rules_of(
    axes: tuple[str | None, ...], rules: dict[str, Any]
) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """Return a rule for each axis of a parameter; a repeated mesh axis counts once, first."""
    found: dict[str, Any] = {}
    for name in axes:
        if name is not None:
            to = rules.get(name)
            found[name] = None if to in found.values() else to
    return tuple(found.items())


def _require_rules(layer: Layer) -> None:
    """Raise unless every logical axis has an active rule or is an axis of the mesh."""
    on_mesh = jax.sharding.get_abstract_mesh().axis_names
    known = {*on_mesh, *dict(get_logical_axis_rules())}
    axes = jax.tree.leaves(layer.param_axes())
    missing = sorted({name for name in axes if name not in known})
    if missing:
        raise ValueError(
            f"Recurrent: no sharding rule for the axes {', '.join(missing)} on a mesh of"
            f" {', '.join(on_mesh)}; pass sharding_rules, e.g. {{{missing[0]!r}: {on_mesh[0]!r}}},"
            " or {} to split nothing."
        )
