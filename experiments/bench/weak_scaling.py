"""Bytes that each device sends when the sequence length grows with the number of devices.

    python -m experiments.bench.weak_scaling
    python -m experiments.bench.weak_scaling --figure=experiments/results/weak_scaling.png

Compiles each layer and its gradients with T split over 1, 2, 4 and 8 virtual devices, with the
same number of steps per device. The bytes are read from the compiled program. Nothing is run, so
no accelerator is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import PartitionSpec as P

from experiments.base import cli, figures
from experiments.bench.tools import Table
from experiments.compiled import collectives
from seqjax import layers, sharding

DEVICES = (1, 2, 4, 8)
DIM, STEPS = 128, 256
# One layer for each op that splits time. Its name begins with the op.
LAYERS: dict[str, layers.Layer] = {
    "linear_scan: LRU": layers.LRU(DIM),
    "linear_scan: S5, both ways": layers.S5(DIM, bidirectional=True),
    "ssm_scan: S4D": layers.S4D(DIM),
    "block_scan: LinOSS": layers.LinOSS(DIM),
    "selective_scan: Mamba": layers.Mamba(DIM),
    "log_scan: LightNet": layers.LightNet(DIM, heads=2),
    "linear_attention: GLA": layers.GLA(DIM, heads=2),
    "delta_rule: DeltaNet": layers.DeltaNet(DIM, heads=2),
    "generalized_delta_rule: Comba": layers.Comba(DIM, heads=2),
    "step_scan: SRWM": layers.SRWM(DIM, heads=2),
    "nonlinear_scan: ParaGRU, by step": layers.ParaGRU(DIM, algorithm="sequential"),
    "nonlinear_scan: ParaGRU, Newton, an iteration": layers.ParaGRU(DIM, algorithm="newton"),
    "attention, window 64": layers.SlidingWindowAttention(DIM, heads=2, window=64),
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    del argv
    flags.DEFINE_string("figure", "weak_scaling.png", "File for the figure.", flag_values=values)


def main(values: Any) -> int:
    """Print the table and draw the figure."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    table = Table(
        f"KiB sent per device, one sequence, {STEPS} steps on each device, {DIM} features, "
        "float32; forward and backward, weights' own gradients left out",
        [str(count) for count in DEVICES],
    )
    curves = {}
    for name, layer in LAYERS.items():
        curves[name] = [sent(layer, count) / 1024 for count in DEVICES]
        table.row(name, dict(zip(map(str, DEVICES), curves[name], strict=True)))
    draw(curves, values.figure)
    print(f"\nBytes over devices: {values.figure}")
    return 0


def sent(layer: layers.Layer, count: int, steps: int = STEPS) -> int:
    """Return the bytes that a device sends in a forward and backward pass on `count` devices."""
    mesh = sharding.make_mesh({"sequence": count}, jax.devices()[:count])
    time = P(None, "sequence")

    def outputs(params: Any, x: jax.Array, reset: jax.Array, sequence_axis: str | None) -> Any:
        return layer.apply(params, x, reset=reset, sequence_axis=sequence_axis)[0]

    split = sharding.split_time(outputs, mesh, (P(), time, time), time)

    def loss(x: jax.Array, params: Any, reset: jax.Array) -> jax.Array:
        return jnp.sum(split(params, x, reset) ** 2)

    x = jax.ShapeDtypeStruct((1, count * steps, layer.dim), jnp.float32)
    reset = jax.ShapeDtypeStruct(x.shape[:2], jnp.bool_)
    params = jax.eval_shape(layer.init, jax.random.key(0))
    compiled = jax.jit(jax.grad(loss)).lower(x, params, reset).compile()
    return collectives.read(str(compiled.as_text())).total


def draw(curves: dict[str, list[float]], path: str) -> None:
    """Plot the bytes over the number of devices, with one labeled line for each layer."""
    figure, (axes,) = figures.panels(1, (9, 5))
    ordered = sorted(curves.items(), key=lambda curve: curve[1][-1])
    colors = [figures.COLORS[number % len(figures.COLORS)] for number in range(len(ordered))]
    for (_, points), color in zip(ordered, colors, strict=True):
        axes.plot(DEVICES, points, "o-", color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xticks(DEVICES, list(map(str, DEVICES)))
    axes.set_xlabel(f"devices, {STEPS} steps each")
    axes.set_ylabel("KiB sent per device")
    figures.name_lines(axes, {name: (DEVICES[-1], x[-1]) for name, x in ordered}, colors)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
