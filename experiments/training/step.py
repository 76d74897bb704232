"""Training step: loss, gradients and optimizer update, on one device or on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from seqjax import sharding

TrainStep = Callable[..., tuple[Any, dict[str, jax.Array]]]


class Trainable(Protocol):
    """A model and its loss; `experiments.objectives.protocol.Objective` extends it with data.

    Attributes:
      model: a model that follows the protocol of a layer.
    """

    model: Any

    def merge(self, params: Any, frozen: Any) -> Any:
        """Return the parameters of the model from the trained and the frozen ones; traced."""

    def prepare(self, batch: Any) -> Any:
        """Convert a batch to the arguments of the loss; traced, before time is split."""

    def loss(self, model: Any, params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        """Return the mean loss over the whole batch and all of time.

        Args:
          model: the objective's model; on a mesh, with sharding constraints on activations.

          params: the parameters.

          batch: a result of `prepare`.

          sequence_axis: the mesh axis that time is split over, or None.
        """


def make_init(model: Any, transform: optax.GradientTransformation) -> Callable[..., Any]:
    """Return `init(key, params=None) -> state`, which creates the state before the first step.

    By default the parameters are drawn from the key.
    """

    def init(key: jax.Array, params: Any = None) -> Any:
        params = model.init(key) if params is None else params
        return {"params": params, "optimizer": transform.init(params)}

    return init


def make_train_step(
    objective: Trainable,
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: sharding.Shardings | None = None,
) -> TrainStep:
    """Return the jitted `train_step(state, batch, step, frozen=None) -> (state, metrics)`.

    It donates `state`. `frozen` has the parameters that are not trained.

    Args:
      objective: the model and the loss to minimize.

      transform: the optimizer.

      schedule: the learning rate of each step, for the metrics.

      shardings: the mesh and the shardings of the state; time is split over the mesh axis
        `sequence`. By default the step runs on one device.
    """
    mesh = None if shardings is None else shardings.mesh
    model = sharding.constrain_activations(objective.model, mesh)

    def local_loss(params: Any, batch: Any, sequence_axis: str | None) -> jax.Array:
        return objective.loss(model, params, batch, sequence_axis)

    def loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
        batch = objective.prepare(batch)
        params = objective.merge(params, frozen)
        time_specs = jax.tree.map(lambda x: P(None, "sequence") if x.ndim > 1 else P(), batch)
        split = sharding.split_time(local_loss, mesh, in_specs=(P(), time_specs), out_specs=P())
        return split(params, batch)

    out_shardings = None
    if shardings is not None:
        state_shardings = {"params": shardings.params, "optimizer": shardings.optimizer}
        out_shardings = (state_shardings, shardings.replicated)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(
        state: Any, batch: Any, step: jax.Array, frozen: Any = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        value, gradients = jax.value_and_grad(loss)(state["params"], frozen, batch)
        updates, optimizer_state = transform.update(gradients, state["optimizer"], state["params"])
        metrics = {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(step)),
        }
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, metrics

    return train_step


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Return whether every number in a tree of arrays is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
