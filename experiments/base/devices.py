"""Devices of a run: one device, or a mesh over the devices of all processes."""

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
    """Define the flags for runs with several processes."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Connect to the other processes of a cluster that JAX detects.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0; needs --num_processes and --process_id.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process.", flag_values=values)


def initialize(values: Any) -> None:
    """Connect this process to the others if a flag asks for it."""
    cluster = [values.coordinator, values.num_processes, values.process_id]
    if not values.distributed and cluster == ["", None, None]:
        return
    if values.coordinator and None in cluster:
        raise UserError("--coordinator needs --num_processes and --process_id as well")
    try:
        jax.distributed.initialize(values.coordinator or None, *cluster[1:])
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect the processes ({str(error).splitlines()[0]}): give --coordinator, "
            "--num_processes and --process_id, or start on a cluster that JAX detects"
        ) from error


def is_main() -> bool:
    """Return whether this process prints and writes the files of the run."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """Return the largest number over all processes; every process must call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gather_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return the union of the JSON values of all processes."""
    if jax.process_count() == 1:
        return values
    text = json.dumps(values).encode()
    padded = np.full(agree(len(text)), ord(" "), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return {name: value for row in everyone for name, value in json.loads(bytes(row)).items()}


class DeviceMesh:
    """A mesh, or one device, with the shardings of a run and the transfer of its batches.

    Attributes:
      mesh: the mesh, or None.
      shardings: the shardings of parameters, optimizer state and batches, or None.
    """

    mesh: jax.sharding.Mesh | None = None
    shardings: sharding.Shardings | None = None

    def __init__(
        self,
        text: str,
        model: Any = None,
        batch_shape: tuple[int, int] | None = None,
        init: Callable[..., Any] | None = None,
        axis_types: str = "auto",
    ) -> None:
        """Make the mesh that `text` names and the shardings of the state that `init(key)` returns.

        Args:
          text: axes and sizes, such as "data=4,fsdp=2"; empty for one device.

          model: the model of the run.

          batch_shape: (B, T) of the training batches.

          init: returns the initial training state for a key.

          axis_types: "auto" or "explicit", see `sharding.make_mesh`.
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
            self.shardings = sharding.shard(
                model,
                self.mesh,
                batch_shape=batch_shape,
                optimizer_state=jax.eval_shape(self._state, jax.random.key(0))["optimizer"],
            )
        except ValueError as error:
            raise UserError(f"config.mesh={text!r}: {error}") from error

    @property
    def state(self) -> Any:
        """Return the shardings of the training state; None on one device."""
        if self.shardings is None:
            return None
        return {"params": self.shardings.params, "optimizer": self.shardings.optimizer}

    def make_state(self, seed: int, params: Any = None) -> Any:
        """Return the initial state, each shard created on its device.

        `params` are the first parameters; by default they are drawn from the seed.
        """
        key = jax.random.key(seed)
        if self.shardings is None:
            return self._state(key, params)
        make = jax.jit(self._state, out_shardings=self.state, donate_argnums=1)
        return make(key, params)

    def _state(self, key: jax.Array, params: Any = None) -> Any:
        assert self._init is not None
        return self._init(key, params)

    def rows(self, batch_size: int) -> Sequence[int]:
        """Return the rows of a global batch that the devices of this process hold."""
        if self.shardings is None:
            return range(batch_size)
        indices = self.shardings.batch.addressable_devices_indices_map((batch_size, 1 << 30))
        held = {row for index in indices.values() if index for row in range(batch_size)[index[0]]}
        return sorted(held)

    def put(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Move arrays [B, T] to the devices; a process needs only the rows that its devices hold.

        If the mesh does not divide the number of rows, every device holds all rows.
        """
        if self.shardings is None:
            return dict(arrays)
        rows = next(iter(arrays.values())).shape[0]
        over = self.shardings.mesh.shape["data"] * self.shardings.mesh.shape["fsdp"]
        target = self.shardings.batch
        if rows % over:
            target = NamedSharding(self.shardings.mesh, P(None, "sequence"))
        return {
            name: jax.make_array_from_callback(array.shape, target, array.__getitem__)
            for name, array in arrays.items()
        }

    def replicate(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, replicated on every device."""
        if self.shardings is None:
            return make()
        return jax.jit(make, out_shardings=self.shardings.replicated)()
