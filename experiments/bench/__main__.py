"""Benchmarks: speed and memory ratios between implementations of the same op.

    python -m experiments.bench            # suites scan, ops, choice, newton: 40 minutes on 2 cores
    python -m experiments.bench scan       # elementwise scan
    python -m experiments.bench ops        # chunked algorithms
    python -m experiments.bench options    # ops and options against what they reduce to
    python -m experiments.bench forward    # forward passes in processor time
    python -m experiments.bench choice     # the default algorithm against the named ones
    python -m experiments.bench newton     # nonlinear RNNs: Newton against sequential
    python -m experiments.bench generate   # tokens per second of generation
    python -m experiments.bench speculate  # speculative decoding: ways to restore a state
    python -m experiments.bench peers      # layers of other libraries against those of seqjax
    python -m experiments.bench loops      # elementwise scan against numba, the last table of peers
    python -m experiments.bench versions   # an earlier version of seqjax, in the folder --tree
    python -m experiments.bench allocator  # training steps with memory that the process keeps
    python -m experiments.bench tpu        # kernels compiled for TPU, not run
    python -m experiments.bench tpu_decode # a decode step compiled for TPU, not run
    python -m experiments.bench tune       # block sizes of kernels compiled for TPU, not run
    python -m experiments.bench gpu        # kernels and XLA compiled for H100, not run
    python -m experiments.bench dense      # Newton on dense cells, predicted for H100 and TPU
    python -m experiments.bench device     # check of this machine's accelerator, 8 minutes

Each row is one shape. Each round times every candidate once. The table prints the median over
rounds of the candidate's time divided by the reference's time in the same round. Ratios within one
run depend less on the machine and its load than absolute times do. An untimed call precedes each
timed call, so that no candidate reuses memory that another one freed. Calls shorter than 5 ms are
repeated for 5 ms.
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
from experiments.bench import (
    allocator,
    cases,
    dense,
    device,
    generate,
    gpu,
    loops,
    newton,
    options,
    peers,
    speculate,
    tpu,
    tpu_decode,
    tune,
    versions,
)
from experiments.bench.tools import (
    CHUNK_SIZE,
    ONLY,
    PROCESSOR_TIME,
    SCAN_SHAPES,
    Candidates,
    Table,
    cpu_seconds,
    ratios,
    seconds,
)

ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of every candidate.", lower_bound=3)

SHORT = 1e-3  # seconds


def by_lax_scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    """Compute the elementwise scan with `lax.scan` over time."""

    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = inputs[0] * h + inputs[1]
        return h, h

    _, y = lax.scan(step, x[:, 0] * 0, (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(y, 0, 1)


def by_associative_scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    """Compute the elementwise scan with `lax.associative_scan`."""

    def combine(early: Any, late: Any) -> Any:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return lax.associative_scan(combine, (decay, x), axis=1)[1]


def forward_and_backward(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return a function for the outputs of `run` and the gradients of both arguments."""

    def both(decay: jax.Array, x: jax.Array, weights: jax.Array) -> Any:
        y, pull = jax.vjp(run, decay, x)
        return y, pull(weights)

    return both


def bench_scan(rounds: int) -> None:
    """Time `linear_scan` and the scans of JAX against `decay + x` on the same arrays."""
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
    """Time the chunked and the default algorithm against `lax.scan` differentiated by JAX."""
    table = Table("Ops, float32, against plain `lax.scan`")
    for name, length, batch in itertools.product(cases.NAMES, (2048, 8192), (1, 4)):
        if not f"{name}, B={batch}, T={length}".startswith(ONLY.value):
            continue
        arrays = cases.arrays(name, batch, length)
        runs = {
            "plain": cases.plain(name),
            "chunked": cases.by("chunked", name, chunk_size=CHUNK_SIZE.value),
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


def bench_forward(rounds: int) -> None:
    """Compare the processor time of forward passes with that of `lax.scan`."""
    table = Table("Forward passes, float32: processor time of plain `lax.scan` over that of an op")
    for name, batch in itertools.product(cases.NAMES, (1, 4)):
        if not f"{name}, B={batch}".startswith(ONLY.value):
            continue
        arrays = cases.arrays(name, batch, 2048)
        runs = {"plain": cases.plain(name)}
        runs |= {str(a or "default"): cases.by(a, name) for a in (None, "chunked")}
        candidates: Candidates = {
            n: functools.partial(jax.jit(run), *arrays) for n, run in runs.items()
        }
        times = cpu_seconds(candidates, rounds)
        row = {n: times["plain"] / times[n] for n in times if n != "plain"}
        table.row(f"{name}, B={batch}, T=2048", row)


def bench_peers(rounds: int) -> None:
    """Time the layers of other libraries, and a numba loop in place of the elementwise scan."""
    peers.bench_peers(rounds)
    loops.bench_loops(rounds)


def temporary_bytes(compiled: Any) -> int:
    """Return the bytes of temporaries of a compiled program, without arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def bench_choice(rounds: int) -> None:
    """Time the default algorithm against the best named algorithm, with gradients."""
    table = Table("Time of each algorithm over that of `algorithm=None`, with gradients")
    grid = itertools.product(cases.NAMES, (16, 64), (4, 64, 512), (1, 8))
    for name, width, length, batch in grid:
        if name in cases.WIDTHLESS and width != 64:
            continue  # these have no width K
        shape = f"B={batch}, T={length}" + ("" if name in cases.WIDTHLESS else f", K={width}")
        if not f"{name}, {shape}".startswith(ONLY.value):
            continue
        arrays = cases.arrays(name, batch, length, width)
        found = [_compare_choices(name, arrays, rounds)]
        # Times of short calls depend on the addresses of code and buffers, so compile again.
        while found[0][1] < SHORT and len(found) < 3:
            jax.clear_caches()
            found.append(_compare_choices(name, arrays, rounds))
        row = {key: statistics.median(times[key] for times, _ in found) for key in found[0][0]}
        best = min(row[algorithm] for algorithm in cases.ALGORITHMS[name])
        table.row(f"{name}, {shape}", {"default over best": 1 / best} | row)


def _compare_choices(name: str, arrays: Any, rounds: int) -> tuple[dict[str, float], float]:
    """Return the ratios of a row and the approximate seconds per call."""
    compiled = {
        str(algorithm): jax.jit(cases.with_gradients(cases.by(algorithm, name)))
        .lower(*arrays)
        .compile()
        for algorithm in (None, *cases.ALGORITHMS[name])
    }
    # Equal programs are timed once, so that noise cannot separate the default from its choice.
    kinds = {algorithm: _work(program) for algorithm, program in compiled.items()}
    programs = {kinds[algorithm]: program for algorithm, program in compiled.items()}
    runs: Candidates = {
        kind: functools.partial(program, *arrays) for kind, program in programs.items()
    }
    times = ratios(runs, kinds["None"], rounds)
    return {name: times[kind] for name, kind in kinds.items()}, seconds(runs[kinds["None"]])


def _work(compiled: Any) -> str:
    """Return a key that differs between programs: their FLOPs, bytes accessed and temporaries."""
    cost = compiled.cost_analysis()
    return f"{cost['flops']} {cost['bytes accessed']} {temporary_bytes(compiled)}"


SUITES = {
    "scan": bench_scan,
    "ops": bench_ops,
    "options": options.bench_options,
    "forward": bench_forward,
    "choice": bench_choice,
    "newton": newton.bench_newton,
    "generate": generate.bench_generate,
    "speculate": speculate.bench_speculate,
    "peers": bench_peers,
    "loops": loops.bench_loops,
    "versions": versions.bench_versions,
    "allocator": allocator.bench_allocator,
    "tpu": tpu.bench_tpu,
    "tpu_decode": tpu_decode.bench_decode,
    "tune": tune.bench_tune,
    "gpu": gpu.bench_gpu,
    "dense": dense.bench_dense,
    "device": lambda rounds: device.main(["--only", ONLY.value]) and None,
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script, which the suites read from absl's global flags."""
    del argv
    suites = (newton.FIGURE, generate.LAYERS, tune.CHIP_NAMES, tune.OUTPUT, versions.TREE)
    for flag in (ROUNDS, ONLY, PROCESSOR_TIME, CHUNK_SIZE, *suites):
        values[flag.name] = flags.FLAGS[flag.name]


def main(values: flags.FlagValues, words: Sequence[str]) -> int:
    """Run the suites named on the command line; by default all timed suites."""
    del values
    flags.FLAGS.mark_as_parsed()
    names = words or ["scan", "ops", "choice", "newton"]
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
