"""DropConnect on recurrent weights."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of the parameters."""
    del out
    return jax.tree.map(
        lambda p: explicit_mesh.joined(*explicit_mesh.spec_of(p)), arguments["params"]
    )


def weight_drop(params: PyTree, rate: float, key: jax.Array, names: Iterable[str]) -> PyTree:
    """Return parameters with entries of the named arrays set to zero at random.

        W' = mask * W / (1 - rate)          mask_ij = 1 with probability 1 - rate

    One mask serves all steps of a call, so that a dropped connection is absent from the whole
    recurrence (AWD-LSTM, arXiv 1708.02182). Use it in training only, with a new key per step.

    Args:
      params: nested dictionaries of arrays.
      rate: probability of zero, in [0, 1).
      key: a random key.
      names: names of the arrays that are dropped, at any depth, such as those of the recurrent
        matrices.

    Raises:
      ValueError: if `rate` is out of range, `names` is one string, or `params` has no array of a
        name.

    Example:
      >>> import jax, seqjax
      >>> layer = seqjax.layers.LSTM(dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> names = ("W_i", "W_f", "W_g", "W_o")
      >>> dropped = seqjax.methods.weight_drop(params, 0.5, jax.random.key(1), names)
      >>> bool((dropped["W_i"] == 0).any()), bool((dropped["in_proj"] == params["in_proj"]).all())
      (True, True)
    """
    if not 0 <= rate < 1:
        raise ValueError(f"weight_drop: `rate` must be in [0, 1), got {rate!r}.")
    if isinstance(names, str):
        raise ValueError(
            f"weight_drop: `names` must be a collection of names, got {names!r}; pass ({names!r},)."
        )
    names = frozenset(names)
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    found = [getattr(path[-1], "key", None) if path else None for path, _ in paths]
    if missing := sorted(names - set(found)):
        known = sorted(str(name) for name in found)
        raise ValueError(f"weight_drop: `names` must be among {known}, got {missing[0]!r}.")
    return _drop(params, rate, key, [name in names for name in found])


@explicit_mesh.auto_inside(_specs)
def _drop(params: PyTree, rate: float, key: jax.Array, chosen: list[bool]) -> PyTree:
    """Drop entries of the chosen leaves."""
    leaves, tree = jax.tree.flatten(params)

    def drop(leaf: jax.Array, key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 1 - rate, leaf.shape)
        return jnp.where(kept, leaf / (1 - rate), jnp.zeros_like(leaf))

    keys = jax.random.split(key, len(leaves))
    dropped = [drop(leaf, keys[i]) if chosen[i] else leaf for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, dropped)
