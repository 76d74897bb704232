"""Predicted time of one decode step on TPU, against moving weights and state once.

    python -m experiments.bench tpu_decode # pip install -e '.[aot]'

A program is the `step` of one layer in bfloat16, with a donated state in float32.
"""

import functools
import itertools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from experiments.base.errors import installed_version
from experiments.bench import tpu
from experiments.bench.tools import ONLY, Table, answer
from experiments.compiled import tpu_schedule
from experiments.compiled.chips import CHIPS
from seqjax.layers import GLA, DeltaNet, Layer

LAYERS: dict[str, Layer] = {
    "delta_rule": DeltaNet(2048, heads=16, gated=True),
    "linear_attention": GLA(2048, heads=16, expand_k=1.0),
}
BATCHES = (1, 64)
PROFILED = (8, 16)
CHIP_NAMES = ("v5e", "v6e")


def program(op: str, batch: int) -> tuple[Any, Any]:
    """Return the step of a layer and the shapes of its arguments: parameters, inputs and state."""
    layer = LAYERS[op]

    def arguments() -> Any:
        params = layer.init(jax.random.key(0), jnp.bfloat16)
        x = jnp.zeros((batch, layer.dim), jnp.bfloat16)
        return params, x, layer.initial_state(batch, jnp.bfloat16)

    return layer.step, jax.eval_shape(arguments)


def _compile(op: str, batch: int, chip: str) -> str:
    """Return the text of the compiled step; runs in the worker process."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(CHIPS[chip].topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    step, shapes = program(op, batch)
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    return jax.jit(step, donate_argnums=2).lower(*args).compile().as_text() or ""


def _ask(op: str, batch: int, chip: str, flags: str = "") -> str:
    with tempfile.TemporaryDirectory() as folder:
        return tpu.compile_apart(
            op,
            batch,
            chip,
            module="experiments.bench.tpu_decode",
            folder=pathlib.Path(folder),
            flags=flags,
        )


@functools.cache
def _cycles(op: str, batch: int, chip: str, flags: str) -> float:
    """Return the cycles of compute: those of a profile with its flags, or an estimate."""
    return tpu_schedule.cost(_ask(op, batch, chip, flags), {}, CHIPS[chip]).cycles


def cycles(op: str, batch: int, chip: str) -> float:
    """Return the cycles of compute of the compiled step.

    The profiler's memory grows with the cycles: a batch of 64 takes more than 3 GB. Cycles of large
    batches are extrapolated linearly from those of `PROFILED`. A batch of 1 differs in kind: its
    products with weights run on the vector unit.
    """
    try:
        if batch <= max(PROFILED):
            return _cycles(op, batch, chip, tpu_schedule.PROFILE)
        few, many = (_cycles(op, n, chip, tpu_schedule.PROFILE) for n in PROFILED)
        return few + (many - few) * (batch - PROFILED[0]) / (PROFILED[1] - PROFILED[0])
    except RuntimeError:  # the profiler crashes on some operations
        return _cycles(op, batch, chip, "")


def bench_decode(rounds: int) -> None:
    """Print the predicted time of one decode step relative to the bound."""
    del rounds  # nothing is timed
    print(f"libtpu {installed_version('libtpu', 'aot')}, no TPU: compiled ahead of time")
    table = Table(
        "One decode step, bfloat16, width 2048, H=16, K=V=128; the bound is reading weights and"
        " state once and writing the state once"
    )
    for op, batch, chip in itertools.product(LAYERS, BATCHES, CHIP_NAMES):
        label = f"{op}, B={batch}, {chip}"
        if not label.startswith(ONLY.value):
            continue
        at, text = CHIPS[chip], _ask(op, batch, chip)
        found, ideal = tpu_schedule.cost(text, {}, at), tpu_schedule.ideal_bytes(text)
        bound, compute = ideal / at.bandwidth, cycles(op, batch, chip) / at.clock
        values: dict[str, float | str] = {
            "bound, us": f"{bound * 1e6:.1f}",
            "bytes / ideal": found.bytes / ideal,
            "cycles / bound": compute / bound,
            # Copies overlap with compute.
            "time / bound": max(compute, found.bytes / at.bandwidth) / bound,
            "operations": str(found.operations),
        }
        table.row(label, values)


if __name__ == "__main__":
    answer(_compile)
