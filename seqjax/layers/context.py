"""Context of one call: resets, the sequence axis, random keys, shared values and extra outputs."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

BACKBONE_INPUT = "backbone_input"


@dataclasses.dataclass(frozen=True)
class Context:
    """Options of one call: resets, the sequence axis, random keys, shared values, extra outputs.

    `Layer.apply` and `Layer.step` make a context, and every layer passes it to its sublayers. A
    layer reads the fields that it needs and ignores the others.

    Layers write to the dictionaries `values` and `aux` while the model is traced. A layer that
    calls a sublayer inside `jax.checkpoint`, `lax.scan` or `jax.vmap` must make a new context with
    empty dictionaries there, and return their content. `Backbone` does so.

    Attributes:
      reset: [B, T] bool, True where the state is cleared before that step; None for no resets.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split, else None.
      key: a `jax.random` key for layers that draw random numbers, such as `Dropout`. Without a key
        they are off, and the call is deterministic.
      block: the index of the block inside its backbone, an integer or a scalar array; 0 outside.
      depth: the number of blocks of the backbone; 1 outside.
      fresh: True if the state is known to be the initial one while the call is traced. A layer that
        calls a sublayer again, with the state that it returned, must set it to False.
      path: names of the enclosing layers.
      values: arrays that blocks hand to later blocks, by name. `Layer.make_values` declares them.
        A backbone writes its own input under the name "backbone_input" if a layer declares it.
      shared: parameters that blocks share, by name. `Layer.declare_shared` declares them.
      aux: extra outputs by path, filled by `record`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> context = Context(key=jax.random.key(0))
      >>> inner = context.enter("mixer")
      >>> inner.record("load", jnp.ones(2))
      >>> list(context.aux)
      ['mixer/load']
    """

    reset: jax.Array | None = None
    sequence_axis: str | None = None
    key: jax.Array | None = None
    block: Any = 0
    depth: int = 1
    fresh: bool = False
    path: tuple[str, ...] = ()
    values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)

    def enter(self, name: str) -> "Context":
        """Return the context for a sublayer, with `name` in its path and folded into its key."""
        key = self.key
        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return dataclasses.replace(self, key=key, path=(*self.path, name))

    def record(self, name: str, value: Any) -> None:
        """Add an extra output: a pytree that `apply_with_aux` returns by its path."""
        self.aux["/".join((*self.path, name))] = value

    def local_key(self) -> jax.Array | None:
        """Return the key for random numbers per position, different on each sequence shard."""
        if self.key is None or self.sequence_axis is None:
            return self.key
        return jax.random.fold_in(self.key, lax.axis_index(self.sequence_axis))
