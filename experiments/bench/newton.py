"""Newton's iterations and time on every cell, at initialization and after training on parity.

Running parity asks after each bit whether the number of ones is odd. A cell that solves it neither
forgets nor acts linearly, which is the hardest case for a solver based on linearization.
"""

import functools
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax import lax

import seqjax
from experiments.base import figures
from experiments.bench import cases
from experiments.bench.tools import Candidates, Table, ratios, seconds
from seqjax import cells, layers

FIGURE = flags.DEFINE_string(
    "figure", "newton.png", "File for the figure of suite newton: iterations over T."
)

DIM = 16
LAYERS = (
    layers.Elman,
    layers.GRU,
    layers.LSTM,
    layers.ParaGRU,
    layers.ParaLSTM,
    layers.SLSTM,
    layers.LEM,
    layers.LTC,
)
LENGTHS = (256, 1024, 4096, 16384, 65536)
# Longest expected seconds of a call (longer calls are skipped), and seconds for all rounds of a
# row (which always has at least one round).
LONGEST_CALL, LONGEST_ROW = 20.0, 6.0
ITERATIONS, STEPS = "iterations", "steps one by one"
GRADIENTS = ", with gradients"
NEWTON, LOOP = "newton / sequential", "sequential / lax.scan"
COLUMNS = [ITERATIONS, STEPS, NEWTON, NEWTON + GRADIENTS, LOOP, LOOP + GRADIENTS, "rounds"]

Params = dict[str, Any]
Run = Callable[..., Any]


class Subject(NamedTuple):
    """A layer with parameters and the kind of inputs that it was initialized or trained for."""

    name: str
    layer: Any
    params: Params
    table: jax.Array | None  # the input vectors for bits 0 and 1; None: normal inputs

    def arrays(self, length: int) -> tuple[Params, jax.Array]:
        """Return the cell's parameters and its pre-activations for one sequence."""
        key, cell, params = jax.random.key(1), self.layer.cell, self.params
        if self.table is None:
            x = jax.random.normal(key, (1, length, DIM))
        else:
            x = self.table[jax.random.bernoulli(key, shape=(1, length)).astype(jnp.int32)]
        u = x @ params["in_proj"] + params["bias"]
        recurrent = {name: params[name] for name in cell.recurrent}
        return recurrent, u.reshape(1, length, cell.gates, cell.dim)


def subjects(make: Any) -> Iterator[Subject]:
    """Yield a layer at initialization and after training on parity."""
    layer = make(DIM)
    yield Subject(f"{make.__name__}, initial", layer, layer.init(jax.random.key(0)), None)
    yield train_on_parity(make(DIM, algorithm="sequential"))


def train_on_parity(layer: Any, steps: int = 1000) -> Subject:
    """Train a layer on the running parity of 32 bits until the loss is below 0.005."""
    start, draw, data = jax.random.split(jax.random.key(0), 3)
    params = {"layer": layer.init(start), "table": jax.random.normal(draw, (2, layer.dim))}
    transform = optax.adam(1e-2)
    state = transform.init(params)

    def loss_of(params: Params, bits: jax.Array) -> jax.Array:
        y, _ = layer.apply(params["layer"], params["table"][bits])
        odd = jnp.cumsum(bits, axis=1) % 2
        return optax.sigmoid_binary_cross_entropy(y[..., 0], odd).mean()

    @jax.jit
    def train_step(params: Params, state: Any, step: int) -> tuple[Params, Any, jax.Array]:
        bits = jax.random.bernoulli(jax.random.fold_in(data, step), shape=(64, 32))
        loss, gradients = jax.value_and_grad(loss_of)(params, bits.astype(jnp.int32))
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    loss = jnp.inf
    for step in range(steps):
        params, state, loss = train_step(params, state, step)
        if step % 25 == 0 and loss < 5e-3:
            break
    learned = "parity" if loss < 5e-3 else f"parity not learned (loss {float(loss):.2f})"
    name = f"{type(layer).__name__}, {learned}"
    return Subject(name, layer, params["layer"], params["table"])


def programs(cell: cells.Cell, h0: jax.Array) -> tuple[dict[str, Run], dict[str, Run]]:
    """Return the jitted candidates, forward only and with gradients."""

    def by(algorithm: str) -> Run:
        return lambda params, u: seqjax.nonlinear_scan(cell, params, u, h0, algorithm=algorithm)

    def plain(params: Params, u: jax.Array) -> tuple[jax.Array]:
        """Run the cell with a plain `lax.scan` over time."""

        def step(h: jax.Array, u_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jax.vmap(cell, in_axes=(None, 0, 0))(params, h, u_t)
            return h, h

        return (jnp.moveaxis(lax.scan(step, h0, jnp.moveaxis(u, 1, 0))[1], 0, 1),)

    def with_gradients(run: Run) -> Run:
        return cases.with_gradients(lambda params, u: run(params, u)[0])

    runs = {"newton": by("newton"), "sequential": by("sequential"), "lax.scan": plain}
    forward: dict[str, Run] = {name: jax.jit(run) for name, run in runs.items()}
    return forward, {name: jax.jit(with_gradients(run)) for name, run in runs.items()}


def bench_newton(rounds: int) -> None:
    """Print Newton's iterations, and times of Newton, sequential and `lax.scan` as ratios."""
    table = Table(f"Newton on nonlinear RNNs, {DIM} channels, one sequence, float32", COLUMNS)
    curves: dict[str, dict[int, int]] = {}
    for make in LAYERS:
        # Initial and trained parameters share the compiled programs.
        layer = make(DIM)
        forward, backward = programs(layer.cell, layer.initial_state(1))
        for subject in subjects(make):
            curves[subject.name] = bench_subject(subject, forward, backward, rounds, table)
        jax.clear_caches()
    draw(curves, FIGURE.value)
    print(f"\nIterations over T: {FIGURE.value}")


def bench_subject(
    subject: Subject, forward: dict[str, Run], backward: dict[str, Run], rounds: int, table: Table
) -> dict[int, int]:
    """Print the rows of one subject; return Newton's iterations by length."""
    found: dict[int, int] = {}
    each_step = 0.0  # seconds; Newton's time is at worst proportional to T
    for length in LENGTHS:
        label, expected = f"{subject.name}, T={length}", each_step * length
        if expected > LONGEST_CALL:
            table.row(label, {ITERATIONS: f"skipped: a call would take {expected:.0f} s"})
            continue
        arrays = subject.arrays(length)
        run = functools.partial(forward["newton"], *arrays)
        info = run()[2]
        found[length] = int(info.iterations[0])
        row: dict[str, float | str] = {
            ITERATIONS: found[length],
            STEPS: int(info.sequential_steps[0]),
        }
        taken = seconds(run)
        each_step = taken / length
        # Every round calls Newton twice without and twice with gradients.
        affordable = min(rounds, max(1, int(LONGEST_ROW / (4 * taken))))
        for suffix, runs in (("", forward), (GRADIENTS, backward)):
            candidates: Candidates = {
                name: functools.partial(run, *arrays) for name, run in runs.items()
            }
            times = ratios(candidates, "sequential", affordable)
            row |= {NEWTON + suffix: times["newton"], LOOP + suffix: 1 / times["lax.scan"]}
        row["rounds"] = affordable
        table.row(label, row)
    return found


def draw(curves: dict[str, dict[int, int]], path: str) -> None:
    """Plot iterations over T, with the line iterations = T for reference.

    Subjects with equal iterations share a line.
    """
    figure, (axes,) = figures.panels(1, (9, 5.5))
    axes.plot(LENGTHS, LENGTHS, "--", color="gray")
    ends: dict[str, tuple[float, float]] = {"T": (LENGTHS[-1], LENGTHS[-1])}
    colors = ["gray"]
    lines: dict[tuple[str, tuple[tuple[int, int], ...]], list[str]] = {}
    for name, curve in curves.items():
        cell, state = name.split(", ", 1)
        lines.setdefault((state, tuple(curve.items())), []).append(cell)
    ordered = sorted(lines.items(), key=lambda line: line[0][1][-1])
    for number, ((state, points), names) in enumerate(ordered):
        look = figures.look(number)
        axes.plot(*zip(*points, strict=True), ":" if state == "initial" else "-", **look)
        ends[textwrap.fill(f"{', '.join(names)}, {state}", 34)] = points[-1]
        colors.append(look["color"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.set_xlabel("T")
    axes.set_ylabel("Newton iterations, all windows together")
    figures.name_lines(axes, ends, colors)
    figure.savefig(path, dpi=120)
