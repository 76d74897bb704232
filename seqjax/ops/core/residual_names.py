"""Names of outputs and residuals, for rematerialization policies of users.

A function under `jax.checkpoint` computes everything again in the backward pass, except what its
policy saves. A policy that saves these names keeps the outputs of ops and the states that their
backward passes start from, so the recurrences do not run again.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqjax.types import PyTree

OUTPUTS = "seqjax_outputs"
RESIDUALS = "seqjax_residuals"
CHECKPOINT_NAMES = (OUTPUTS, RESIDUALS)
"""The names of outputs and states of the ops, for `jax.checkpoint_policies`."""


def named(tree: PyTree, name: str) -> PyTree:
    """Return the tree with a name on its real arrays.

    JAX cannot save complex residuals in a checkpoint with a policy: it applies
    `lax.reduce_precision` to them.
    """

    def leaf(x: jax.Array) -> jax.Array:
        return x if jnp.iscomplexobj(x) else checkpoint_name(x, name)

    return jax.tree.map(leaf, tree)
