"""Benchmarks: ratios between ways of computing the same thing, measured in one run.

    python -m experiments.bench            # all of it, 40 minutes on two cores
    python -m experiments.bench scan       # the elementwise scan
    python -m experiments.bench ops        # the chunked forms
    python -m experiments.bench choice     # what algorithm=None picks
    python -m experiments.bench newton     # nonlinear RNNs: Newton against step by step
    python -m experiments.bench tpu        # kernels on TPUs that are not there; only if named
    python -m experiments.bench gpu        # what ptxas says of kernels for H100; only if named

Every row is one shape; every candidate is timed once per round, in turn, and what is printed is
the median over the rounds of its time divided by the reference's time in the same round. Lone
times say more about the machine and its neighbours than about the code. A call that is not timed
goes before each that is, so that nobody finds memory that another candidate left behind; what takes
less than 5 ms is called as often as fills them.
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax

import seqjax
from experiments.base import cli
from experiments.base.errors import UserError, nearest
from experiments.bench import cases, gpu, newton, tpu
from experiments.bench.tools import ONLY, Candidates, Table, ratios, seconds

ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of every candidate.", lower_bound=3)

SHORT = 1e-3  # seconds
SCAN_SHAPES = ((8, 2048, 512), (1, 65536, 64), (32, 1024, 256))


def by_lax_scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    """What one writes without a library: `lax.scan` over time."""

    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = inputs[0] * h + inputs[1]
        return h, h

    _, y = lax.scan(step, x[:, 0] * 0, (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(y, 0, 1)


def by_associative_scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    """The same by `lax.associative_scan`."""

    def combine(early: Any, late: Any) -> Any:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return lax.associative_scan(combine, (decay, x), axis=1)[1]


def forward_and_backward(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The outputs of `run` and the gradients of both arguments."""

    def both(decay: jax.Array, x: jax.Array, weights: jax.Array) -> Any:
        y, pull = jax.vjp(run, decay, x)
        return y, pull(weights)

    return both


def bench_scan(rounds: int) -> None:
    """linear_scan against `decay + x` on the same arrays, and against JAX's own scans."""
    table = Table("Elementwise scan, float32: time over that of `decay + x`")
    runs = {
        "seqjax": lambda decay, x: seqjax.linear_scan(decay, x)[0],
        "lax.scan": by_lax_scan,
        "associative_scan": by_associative_scan,
    }
    for shape in SCAN_SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        decay = jax.random.uniform(keys[0], shape)
        x, weights = (jax.random.normal(key, shape) for key in keys[1:])
        candidates: Candidates = {"decay + x": functools.partial(jax.jit(jnp.add), decay, x)}
        for name, run in runs.items():
            candidates[name] = functools.partial(jax.jit(run), decay, x)
        for name, run in runs.items():
            both = jax.jit(forward_and_backward(run))
            candidates[f"{name}, with gradients"] = functools.partial(both, decay, x, weights)
        table.row(str(list(shape)), ratios(candidates, "decay + x", rounds))


def bench_ops(rounds: int) -> None:
    """Chunked forms, and what runs by default, against `lax.scan` differentiated by JAX."""
    table = Table("Matrix and selective states, float32, against plain `lax.scan`")
    for name, length, batch in itertools.product(cases.NAMES, (2048, 8192), (1, 4)):
        arrays = cases.arrays(name, batch, length)
        runs = {
            "plain": cases.plain(name),
            "chunked": cases.by("chunked", name),
            "default": cases.by(None, name),
        }
        row: dict[str, float] = {}
        for suffix, wrap in (
            ("", lambda run: run),
            (" with gradients", cases.with_gradients),
        ):
            compiled = {n: jax.jit(wrap(run)).lower(*arrays).compile() for n, run in runs.items()}
            times = ratios(
                {n: functools.partial(run, *arrays) for n, run in compiled.items()},
                "plain",
                rounds,
            )
            memory = {n: temporary_bytes(run) for n, run in compiled.items()}
            for n in ("chunked", "default"):
                row[f"{n}{suffix}: speed-up"] = 1 / times[n]
                row[f"{n}{suffix}: memory"] = memory[n] / memory["plain"]
        table.row(f"{name}, B={batch}, T={length}", row)


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program allocates besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def bench_choice(rounds: int) -> None:
    """What `algorithm=None` picks against the best of the named algorithms, with gradients."""
    table = Table("Time of each algorithm over that of `algorithm=None`, with gradients")
    grid = itertools.product(cases.NAMES, (16, 64), (4, 64, 512), (1, 8))
    for name, width, length, batch in grid:
        if name == "selective_scan" and width != 64:
            continue  # it has no such width
        shape = f"B={batch}, T={length}" + ("" if name == "selective_scan" else f", K={width}")
        if not f"{name}, {shape}".startswith(ONLY.value):
            continue
        arrays = cases.arrays(name, batch, length, width)
        found = [_compare_choices(name, arrays, rounds)]
        # Short calls differ by where code and buffers happen to lie: a new draw.
        while found[0][1] < SHORT and len(found) < 3:
            jax.clear_caches()
            found.append(_compare_choices(name, arrays, rounds))
        row = {key: statistics.median(times[key] for times, _ in found) for key in found[0][0]}
        best = min(row[algorithm] for algorithm in cases.ALGORITHMS[name])
        table.row(f"{name}, {shape}", {"None over the best": 1 / best} | row)


def _compare_choices(name: str, arrays: Any, rounds: int) -> tuple[dict[str, float], float]:
    """The ratios of a row, and about how many seconds a call takes."""
    compiled = {
        str(algorithm): jax.jit(cases.with_gradients(cases.by(algorithm, name)))
        .lower(*arrays)
        .compile()
        for algorithm in (None, *cases.ALGORITHMS[name])
    }
    # Equal programs are one candidate: None is as fast as what it picks, however lucky that was.
    kinds = {algorithm: _work(program) for algorithm, program in compiled.items()}
    programs = {kinds[algorithm]: program for algorithm, program in compiled.items()}
    runs: Candidates = {
        kind: functools.partial(program, *arrays) for kind, program in programs.items()
    }
    times = ratios(runs, kinds["None"], rounds)
    return {name: times[kind] for name, kind in kinds.items()}, seconds(runs[kinds["None"]])


def _work(compiled: Any) -> str:
    """What tells programs apart: what they compute, read and write, and keep."""
    cost = compiled.cost_analysis()
    return f"{cost['flops']} {cost['bytes accessed']} {temporary_bytes(compiled)}"


SUITES = {
    "scan": bench_scan,
    "ops": bench_ops,
    "choice": bench_choice,
    "newton": newton.bench_newton,
    "tpu": tpu.bench_tpu,
    "gpu": gpu.bench_gpu,
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script, which the suites read from absl's global flags."""
    del argv
    for flag in (ROUNDS, ONLY, newton.FIGURE):
        values[flag.name] = flags.FLAGS[flag.name]


def main(values: flags.FlagValues, words: Sequence[str]) -> int:
    """Run the suites named on the command line, all that are timed here if none is."""
    del values
    flags.FLAGS.mark_as_parsed()
    names = words or [name for name in SUITES if name not in ("tpu", "gpu")]
    for name in names:
        if name not in SUITES:
            raise UserError(f"unknown suite {name!r}: {nearest(name, SUITES)}")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}, {ROUNDS.value} rounds")
    for name in names:
        SUITES[name](ROUNDS.value)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main, takes_words=True))
