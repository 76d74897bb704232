"""Where a run computes: one device, or a mesh over the devices of all processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.base.errors import UserError
from seqjax import sharding

_AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of a run of several processes."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "One process of several; the cluster's environment says which.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, where the environment does not say; with the next two.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process.", flag_values=values)


def initialize(values: Any) -> None:
    """Connects this process to the others, where flags say that there are any."""
    given = [values.coordinator, values.num_processes, values.process_id]
    if not values.distributed and given == ["", None, None]:
        return
    if values.coordinator and None in given:
        raise UserError("--coordinator needs --num_processes and --process_id as well")
    try:
        jax.distributed.initialize(values.coordinator or None, *given[1:])
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect the processes ({str(error).splitlines()[0]}): give --coordinator, "
            "--num_processes and --process_id, or start under a cluster that JAX knows"
        ) from error


def is_main() -> bool:
    """Whether this process is the one that prints and writes what all of them know."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The largest of the numbers that the processes give; all of them must ask."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gather_json(parts: dict[str, Any]) -> dict[str, Any]:
    """The union of every process's JSON values, on every process."""
    if jax.process_count() == 1:
        return parts
    text = json.dumps(parts).encode()
    padded = np.full(agree(len(text)), ord(" "), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return {name: part for row in everyone for name, part in json.loads(bytes(row)).items()}


class Devices:
    """A mesh (None: one device), the shardings of a run on it, and the batches placed there.

    Attributes:
      mesh: the mesh, or None.
      plan: the shardings of parameters, optimizer state and batches, or None.
    """

    mesh: jax.sharding.Mesh | None = None
    plan: sharding.Shardings | None = None

    def __init__(
        self,
        text: str,
        model: Any = None,
        batch_shape: tuple[int, int] | None = None,
        init: Callable[..., Any] | None = None,
        axis_types: str = "auto",
    ) -> None:
        """Makes the mesh that `text` names and the shardings of `init(key)`'s state.

        Its axes are "auto" or "explicit", see `sharding.make_mesh`.
        """
        self._init = init
        if axis_types not in _AXIS_TYPES:
            raise UserError(
                f"the config field mesh_axis_types={axis_types!r} must be auto or explicit"
            )
        if not text:
            if jax.process_count() > 1:
                raise UserError(
                    f"{jax.process_count()} processes need a mesh over their devices, for example "
                    "--config.mesh=data=-1"
                )
            return
        try:
            self.mesh = sharding.make_mesh(text, axis_types=_AXIS_TYPES[axis_types])
            self.plan = sharding.shard(
                model,
                self.mesh,
                batch_shape=batch_shape,
                optimizer_state=jax.eval_shape(self._state, jax.random.key(0))["optimizer"],
            )
        except ValueError as error:
            raise UserError(f"config.mesh={text!r}: {error}") from error

    @property
    def state(self) -> Any:
        """The shardings of the training state; None on one device."""
        if self.plan is None:
            return None
        return {"params": self.plan.params, "optimizer": self.plan.optimizer}

    def make_state(self, seed: int) -> Any:
        """The state to start from, each part made where it lives."""
        key = jax.random.key(seed)
        if self.plan is None:
            return self._state(key)
        return jax.jit(self._state, out_shardings=self.state)(key)

    def _state(self, key: jax.Array) -> Any:
        assert self._init is not None
        return self._init(key)

    def rows(self, batch_size: int) -> Sequence[int]:
        """The rows of a global batch that this process's devices hold."""
        if self.plan is None:
            return range(batch_size)
        indices = self.plan.batch.addressable_devices_indices_map((batch_size, 1 << 30))
        held = {row for index in indices.values() if index for row in range(batch_size)[index[0]]}
        return sorted(held)

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Arrays [B, T] of which each process knows the rows it holds, on the devices.

        Rows that the mesh does not divide are held by all.
        """
        if self.plan is None:
            return dict(arrays)
        rows = next(iter(arrays.values())).shape[0]
        over = self.plan.mesh.shape["data"] * self.plan.mesh.shape["fsdp"]
        where = self.plan.batch
        if rows % over:
            where = NamedSharding(self.plan.mesh, P(None, "sequence"))
        return {
            name: jax.make_array_from_callback(array.shape, where, array.__getitem__)
            for name, array in arrays.items()
        }

    def everywhere(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, on every device."""
        if self.plan is None:
            return make()
        return jax.jit(make, out_shardings=self.plan.replicated)()
