"""Memory, traffic and minimum time of a training step on a TPU slice, without a TPU.

    python -m experiments.plan --topology=v5e:16x16 \\
        --config=experiments/configs/pod.py:gated_deltanet_1b
    python -m experiments.plan --table=v5e:16x16,v5p:4x4x4      # a table of every recipe
    python -m experiments.plan --table=published                # of published models

Compiles the training step ahead of time with the TPU compiler. Needs the `aot` extra.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from experiments.base import cli
from experiments.base.errors import UserError, nearest
from experiments.compiled import collectives, flops
from experiments.compiled.chips import CHIPS as ALL_CHIPS
from experiments.compiled.chips import Chip
from experiments.configs import pod, published
from experiments.objectives import abstract
from experiments.training import optimizer
from experiments.training.step import make_init, make_train_step
from seqjax import sharding

# TPU7x is left out: it has two devices per chip, and a plan assumes one.
CHIPS = {name: ALL_CHIPS[name] for name in ("v5e", "v5p", "v6e")}


TOPOLOGY = "v5e:16x16"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Resources of a compiled training step, per chip unless stated otherwise.

    Attributes:
      chips: number of chips.

      mesh: size of each mesh axis.

      parameters: number of parameters of the model.

      tokens: tokens per step on all chips.

      model_flops: operations per step on all chips.

      hbm: bytes of memory; None if the step does not fit and the compiler did not report them.

      limit: bytes of memory of a chip.

      fits: whether the step fits into memory.

      state_bytes: bytes of parameters, optimizer state and batch.

      temporary_bytes: bytes of temporaries.

      traffic: the collectives; None if the step does not fit.

      seconds: compile time.

      remat: whether blocks are recomputed in the backward pass.

      chip: specification of the chip.
    """

    chips: int
    mesh: dict[str, int]
    parameters: int
    tokens: int
    model_flops: int
    hbm: float | None
    limit: float
    fits: bool
    state_bytes: int
    temporary_bytes: int
    traffic: collectives.Traffic | None
    seconds: float
    remat: bool
    chip: Chip

    def times(self) -> dict[str, float]:
        """Compute the seconds of compute, memory and links at the chip's peak rates.

        Compute is the operations of the model, plus a third if blocks are recomputed. Memory is
        one read and one write of the state and of the temporaries. Links is the time to send all
        bytes over one axis of the torus.
        """
        again = 4 / 3 if self.remat else 1
        sent = self.traffic.total if self.traffic else 0
        return {
            "compute": again * self.model_flops / self.chips / self.chip.flops,
            "memory": 2 * (self.state_bytes + self.temporary_bytes) / self.chip.bandwidth,
            "links": sent / self.chip.link,
        }

    def overlapped_seconds(self) -> float:
        """Compute the minimum seconds of a step if asynchronous collectives overlap with compute.

        All other collectives do not overlap.
        """
        times = self.times()
        hidden = (self.traffic.asynchronous if self.traffic else 0) / self.chip.link
        return max(times["compute"], times["memory"], hidden) + times["links"] - hidden

    def step_seconds(self) -> float:
        """Compute the minimum seconds of a step if communication does not overlap with compute."""
        times = self.times()
        return max(times["compute"], times["memory"]) + times["links"]


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    cli.define_config(values, argv)
    flags.DEFINE_string(
        "topology",
        "",
        f"TPU slice, such as v5p:4x4x4; empty: that of the configuration, or {TOPOLOGY}.",
        flag_values=values,
    )
    flags.DEFINE_string("mesh", "", "Mesh; empty: that of the configuration.", flag_values=values)
    flags.DEFINE_list(
        "table",
        [],
        "Slices for a table of all recipes, or `published` for one of published models.",
        flag_values=values,
    )


def main(values: Any) -> int:
    """Plan the selected configuration or all recipes; return 1 if a step does not fit."""
    if values.table:
        return 0 if table(values.table) else 1
    config = cli.require_config(values)
    topology = values.topology or config.get("published", {}).get("topology", TOPOLOGY)
    plan = make_plan(config, topology, values.mesh or config.mesh)
    print(report(config, plan))
    return 0 if plan.fits else 1


def table(topologies: Sequence[str]) -> bool:
    """Print a row for every recipe, length and slice; return whether all fit.

    With "published", print a row for each published model and what is trained, on its own slice.
    """
    if list(topologies) == ["published"]:
        named = [published.get_config(",".join(words)) for words in published.SLICES]
        jobs = [(config.published.topology, config) for config in named]
    else:
        jobs = [
            (topology, pod.get_config(f"{name},{length}"))
            for topology, name, length in itertools.product(topologies, pod.MODELS, pod.LENGTHS)
        ]
    for topology in {topology for topology, _ in jobs}:
        topology_devices(topology)  # report a mistake before the first compilation
    print(f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}\n\n{HEADER}")
    fit = []
    for topology, config in jobs:
        plan = make_plan(config, topology, config.mesh)
        print(row(config, topology, plan), flush=True)
        fit.append(plan.fits)
        jax.clear_caches()
    return all(fit)


def topology_devices(topology: str) -> tuple[Chip, list[Any]]:
    """Return the chip and the devices of a TPU slice, without a TPU."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: unknown chip {name!r}: {nearest(name, CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install -e '.[aot]' from a clone")
    # Without this, libtpu queries a metadata server that exists only in Google's cloud, and blocks.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return CHIPS[name], list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0]}; write v5e:16x16 or v5p:4x4x4"
        ) from error


def make_plan(config: ConfigDict, topology: str, mesh_text: str) -> Plan:
    """Compile the training step of a configuration for a topology."""
    chip, chips = topology_devices(topology)
    made = abstract.make(config)
    model, trained = made.objective.model, made.objective.trained
    transform = optimizer.make_optimizer(config.optimizer, config.steps, trained.param_roles())
    schedule = optimizer.make_schedule(config.optimizer, config.steps)
    state = jax.eval_shape(make_init(trained, transform), jax.random.key(0), made.params)
    shape = (config.data.batch_size, config.data.length)
    try:
        mesh = sharding.make_mesh(mesh_text, devices=chips)
        shardings = sharding.shard(
            trained, mesh, batch_shape=shape, optimizer_state=state["optimizer"]
        )
        whole = sharding.shard(model, mesh).params
    except ValueError as error:
        raise UserError(f"the mesh {mesh_text!r} on {topology}: {error}") from error

    def sharded(leaf: Any, to: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)

    state = jax.tree.map(
        sharded, state, {"params": shardings.params, "optimizer": shardings.optimizer}
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings.batch)
        for name, dtype in made.batch.items()
    }
    frozen = None if made.frozen is None else jax.tree.map(sharded, made.frozen, whole)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=shardings.replicated)
    step: Any = make_train_step(made.objective, transform, schedule, shardings)
    began = time.perf_counter()
    lowered = step.lower(state, batch, index, frozen)
    known = {
        "chips": len(chips),
        "mesh": dict(mesh.shape),
        "parameters": flops.count_params(model),
        "tokens": shape[0] * shape[1],
        "model_flops": flops.train_flops(model, *shape),
        "limit": chip.hbm,
        "remat": config.model.remat,
        "chip": chip,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        held = sum(_local_bytes(leaf) for leaf in jax.tree.leaves((state, batch, frozen)))
        used = _used(str(error), held)
        return Plan(
            **known,
            hbm=used,
            fits=False,
            state_bytes=held,
            temporary_bytes=int(used - held) if used else 0,
            traffic=None,
            seconds=time.perf_counter() - began,
        )
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes
    # The peak includes arguments and results. `temp_size_in_bytes` also includes other memory
    # spaces and gaps between arrays, which makes it up to half as large again.
    hbm = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return Plan(
        **known,
        hbm=hbm,
        fits=hbm <= chip.hbm,
        state_bytes=held,
        temporary_bytes=hbm - held,
        traffic=collectives.read(compiled.as_text()),
        seconds=time.perf_counter() - began,
    )


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    size = leaf.dtype.itemsize
    for length in leaf.sharding.shard_shape(leaf.shape):
        size *= length
    return size


def _used(message: str, held: int) -> float | None:
    """Parse the bytes that a program needs from the compiler's out-of-memory message.

    Older versions of libtpu report all bytes. Version 0.0.50 reports the temporaries, to which
    `held`, the bytes of the arguments, is added.
    """
    for words, more in ((r"[Uu]sed", 0), (r"required for HLO temporaries \(", held)):
        match = re.search(rf"{words} ?([\d.]+)([KMGT]?)\)? (?:of|exceeds)", message)
        if match is not None:
            return float(match[1]) * 1024 ** " KMGT".index(match[2] or " ") + more
    return None


def what_would_fit(config: ConfigDict, plan: Plan) -> str:
    """Return the first change to try if a step does not fit."""
    used = plan.hbm or 2 * plan.limit
    room = plan.limit - plan.state_bytes
    if room <= 0:
        return "parameters and optimizer state alone do not fit: give the axis fsdp more chips"
    if not config.model.remat:
        return "--config.model.remat=True recomputes blocks in the backward pass to save memory"
    # Temporaries grow with the number of positions per chip.
    times = -(-(used - plan.state_bytes) // room)
    over = plan.mesh["data"] * plan.mesh["fsdp"]
    if config.data.batch_size >= times * over:
        smaller = int(config.data.batch_size // times // over * over)
        return f"--config.data.batch_size={smaller} has as many sequences per chip as fit"
    return f"make the axis sequence {int(times)} times as large and fsdp as much smaller"


def _gigabytes(size: float | None) -> str:
    return "more than available" if size is None else f"{size / 2**30:.2f} GiB"


def report(config: ConfigDict, plan: Plan) -> str:
    """Return a plan as text."""
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    lines = [
        f"{config.name}: {plan.parameters / 1e9:.2f} billion parameters, "
        f"{config.data.batch_size} x {config.data.length} tokens a step, {plan.chips} chips, "
        f"{axes}; compiled in {plan.seconds:.0f} s",
        f"memory per chip: {_gigabytes(plan.hbm)} of {_gigabytes(plan.limit)} "
        f"({_gigabytes(plan.state_bytes)} parameters, optimizer state and batch)",
    ]
    if not plan.fits:
        return "\n".join([*lines, f"DOES NOT FIT: {what_would_fit(config, plan)}"])
    assert plan.traffic is not None
    for kind in sorted(plan.traffic.sent):
        lines.append(
            f"  {kind}: {plan.traffic.counts[kind]} times, "
            f"{plan.traffic.sent[kind] / 2**20:.1f} MiB sent per chip"
        )
    if plan.traffic.unknown_loops:
        lines.append(
            f"  {plan.traffic.unknown_loops} loops with collectives have a data-dependent number "
            "of iterations and are counted once"
        )
    times, step = plan.times(), plan.step_seconds()
    rate = plan.tokens / step / plan.chips
    lines += [
        f"model FLOPs per step: {plan.model_flops:.3e}, "
        f"{plan.model_flops / plan.tokens / 1e9:.2f} billion per token",
        "at the chip's peak: "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items()),
        f"a step takes at least {1e3 * step:.1f} ms, {100 * times['links'] / step:.0f} % of it "
        f"communication if none is hidden: {rate:,.0f} tokens per second and chip",
        _overlap(plan),
        "FITS",
    ]
    return "\n".join(lines)


def _overlap(plan: Plan) -> str:
    """Describe how much of the communication the compiler overlaps with compute."""
    assert plan.traffic is not None
    if not plan.traffic.total:
        return "chips do not communicate"
    if not plan.traffic.asynchronous:
        return (
            "the compiler overlaps no communication with compute: all collectives are synchronous"
        )
    share = plan.traffic.asynchronous / plan.traffic.total
    seconds = plan.overlapped_seconds()
    return (
        f"the compiler overlaps {100 * share:.0f} % of the bytes with compute: "
        f"{1e3 * seconds:.1f} ms a step, {plan.tokens / seconds / plan.chips:,.0f} tokens per "
        "second and chip"
    )


HEADER = (
    "| recipe | topology | mesh | tokens a step | HBM per chip | sent per chip and step "
    "| tokens/s per chip, at most |\n|---|---|---|---|---|---|---|"
)


def row(config: ConfigDict, topology: str, plan: Plan) -> str:
    """Return a plan as a row under HEADER."""
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    fits = plan.traffic is not None and plan.fits
    cells = [
        config.name,
        topology,
        axes,
        f"{config.data.batch_size} x {config.data.length}",
        f"{_gigabytes(plan.hbm)} of {plan.limit / 2**30:.0f}" + ("" if fits else ": does not fit"),
        f"{plan.traffic.total / 2**20:,.0f} MiB" if plan.traffic else "",
        f"{plan.tokens / plan.step_seconds() / plan.chips:,.0f}" if fits else "",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
