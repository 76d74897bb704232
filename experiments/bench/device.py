"""Check of the library on the machine's accelerator: correctness, times, Newton, training steps.

    python -m experiments.bench device                      # 8 minutes, needs jax and no extra
    python -m experiments.bench device --only "delta_rule"  # rows whose name contains this
    python -m experiments.bench device --tiny               # small sizes, for a CPU

Programs are compiled first, in threads, and timed alone afterwards. Each row is printed and written
to the JSON file as soon as it is known. Programs that are not compiled within half of the time are
left out, and their rows say so.
"""

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from seqjax.ops.core.backends import BACKENDS

# Published peaks of dense bfloat16 matmuls, in operations per second, by a part of the device kind.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "v5 lite": 197e12, "v6 lite": 918e12}
CELLS = ("Elman", "GRU", "LSTM", "ParaGRU", "ParaLSTM", "SLSTM", "LEM", "LTC")
MATRIX_FORMS = {"no decay": 0, "decay per head": 1, "decay per channel": 2}


class Sizes(NamedTuple):
    """Sizes of the rows: [B, T, D] of the scans, [B, T, H, K] of matrix states, and others."""

    linear: tuple[tuple[int, int, int, str], ...]
    selective: tuple[int, int, int, int]
    matrix: tuple[int, int, int, int]
    cells: tuple[int, int, int]
    model: tuple[int, int, int, int, int]  # vocabulary, width, depth, batch, steps
    copy: int


FULL = Sizes(
    linear=(
        (8, 4096, 2560, "float32"),
        (8, 4096, 2560, "bfloat16"),
        (1, 65536, 512, "float32"),
        (32, 1024, 256, "float32"),
    ),
    selective=(8, 4096, 2048, 16),
    matrix=(4, 2048, 16, 128),
    cells=(8, 1024, 128),
    model=(32000, 1024, 12, 8, 2048),
    copy=2**28,
)
TINY = Sizes(
    ((2, 64, 128, "float32"),),
    (2, 64, 128, 4),
    (1, 64, 2, 16),
    (2, 32, 8),
    (64, 32, 2, 2, 32),
    2**16,
)
CORRECT = TINY._replace(
    linear=((2, 257, 256, "float32"), (2, 257, 256, "bfloat16")),
    selective=(2, 130, 256, 8),
    matrix=(2, 130, 2, 64),
)


class Job(NamedTuple):
    """A program to compile and run.

    Attributes:
      section: "correct", "ops", "newton" or "train".
      name: label of the row.
      run: the function.
      inputs: specifications of its arguments.
      measure: (compiled, arguments) -> the columns of the row.
    """

    section: str
    name: str
    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    measure: Callable[[Any, tuple[Any, ...]], dict[str, Any]]


class Input(NamedTuple):
    """An argument: shape, dtype and distribution (normal, unit vectors, or uniform in a range)."""

    shape: tuple[int, ...]
    dtype: str
    draw: Any = "normal"

    def spec(self) -> jax.ShapeDtypeStruct:
        """Return shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def make(self, seed: int) -> np.ndarray:
        """Draw the array."""
        rng = np.random.default_rng(seed)
        x: np.ndarray
        if isinstance(self.draw, tuple):
            x = rng.uniform(self.draw[0], self.draw[1], self.shape)
        else:
            x = rng.standard_normal(self.shape, np.float32)
            if self.draw == "unit":
                x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return np.asarray(x, jnp.dtype(self.dtype))


def op_calls(sizes: Sizes) -> Iterator[tuple[str, str, dict[str, Input]]]:
    """Yield label, op and arguments of the ops' rows."""
    for *shape, dtype in sizes.linear:
        x = Input(tuple(shape), dtype)
        inputs = {"decay": x._replace(draw=(0.5, 1.0)), "x": x}
        yield f"linear_scan {shape} {dtype}", "linear_scan", inputs
    B, T, D, N = sizes.selective
    x, b = Input((B, T, D), "bfloat16"), Input((B, T, N), "bfloat16")
    yield (
        f"selective_scan {[B, T, D]}, N={N} bfloat16",
        "selective_scan",
        {
            "x": x,
            "dt": x._replace(draw=(0.001, 0.1)),
            "A": Input((D, N), "float32", (-16.0, -1.0)),
            "B": b,
            "C": b,
        },
    )
    for op in ("linear_attention", "delta_rule", "generalized_delta_rule"):
        row, gate = Input(sizes.matrix, "bfloat16"), Input(sizes.matrix[:3], "float32")
        for form, axes in MATRIX_FORMS.items():
            if op == "generalized_delta_rule" and axes < 2:
                continue
            unit = row._replace(draw="unit")
            made = {"q": row, "k": unit, "v": row}
            if op == "delta_rule":
                made["beta"] = gate._replace(draw=(0.0, 1.0))
            if op == "generalized_delta_rule":
                made |= {"a": unit, "b": row._replace(draw=(-0.1, 0.1))}
            if axes:
                made["log_decay"] = Input(sizes.matrix[: 2 + axes], "float32", (-0.1, 0.0))
            yield f"{op}, {form} {list(sizes.matrix)} bfloat16", op, made


def with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for the outputs of `run` and the gradients of all arguments."""

    def both(*args: jax.Array) -> Any:
        y, pull = jax.vjp(run, *args)
        return y, pull(y)

    return both


def implementations(op: str, inputs: dict[str, Input]) -> list[str | None]:
    """Return None for the default, and both backends by name where there is a kernel."""
    kernels = BACKENDS[op]
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    has_kernel = kernels is not None and platform in kernels.modules
    per_channel = "log_decay" in inputs and len(inputs["log_decay"].shape) == 4
    if platform == "cuda" and per_channel:  # the GPU kernels have decays per head
        return [None]
    return [None, "pallas", "xla"] if has_kernel else [None]


def nbytes(inputs: Sequence[Input]) -> float:
    """Return the bytes of arguments."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in inputs)


def milliseconds(compiled: Any, args: Sequence[Any], budget: float = 0.15) -> float:
    """Return the median over rounds of the time of queued calls."""
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    once = max(time.perf_counter() - start, 1e-6)
    calls = max(1, min(30, int(budget / once)))
    times = []
    for _ in range(3 if once > budget else 5):
        start = time.perf_counter()
        for _ in range(calls):
            result = compiled(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def op_jobs(sizes: Sizes, bandwidth: Callable[[], float]) -> Iterator[Job]:
    """Yield the times of ops, with `a + x` for the scans."""

    def timed(moved: float) -> Callable[[Any, tuple[Any, ...]], dict[str, Any]]:
        def measure(compiled: Any, args: tuple[Any, ...]) -> dict[str, Any]:
            return _timed(compiled, args) | {"roofline ms": moved / bandwidth() * 1e3}

        return measure

    for label, op, inputs in op_calls(sizes):
        given = tuple(inputs.values())
        if op == "linear_scan":
            both = timed(1.5 * nbytes(given))
            yield Job("ops", f"a + x {label.split(' ', 1)[1]}", jnp.add, given, both)
        result = nbytes([inputs["v"] if "v" in inputs else inputs["x"]])
        for implementation in implementations(op, inputs):
            run = _call(op, tuple(inputs), implementation=implementation)
            name = f"{label}, {implementation or 'default'}"
            moved = nbytes(given) + result
            yield Job("ops", name, run, given, timed(moved))
            name += ", with gradients"
            yield Job("ops", name, with_gradients(run), given, timed(2 * moved))


def _call(op: str, names: tuple[str, ...], **keywords: Any) -> Callable[..., jax.Array]:
    return lambda *args: getattr(seqjax, op)(**dict(zip(names, args, strict=True)), **keywords)[0]


def correct_jobs(sizes: Sizes) -> Iterator[Job]:
    """Yield comparisons of values and gradients with the sequential algorithm in float64 on CPU."""
    for label, op, inputs in op_calls(sizes):
        names = tuple(inputs)
        for implementation in implementations(op, inputs):
            run = with_gradients(_call(op, names, implementation=implementation))
            exact = with_gradients(_call(op, names, algorithm="sequential"))
            name = f"{label}, {implementation or 'default'}"
            measure = functools.partial(_compare, exact)
            yield Job("correct", name, run, tuple(inputs.values()), measure)


def _compare(exact: Callable[..., Any], compiled: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the largest errors relative to the largest number of each result."""
    found = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), compiled(*args))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in args]
        y, pull = jax.vjp(lambda *args: exact(*args)[0], *wide)
        # The cotangents are the outputs that the program rounded.
        expected = jax.tree.map(np.asarray, (y, pull(jnp.asarray(found[0]))))

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    gradients = zip(found[1], expected[1], strict=True)
    return {
        "error of values": error(found[0], expected[0]),
        "error of gradients": max(error(a, b) for a, b in gradients),
    }


def newton_jobs(sizes: Sizes) -> Iterator[Job]:
    """Yield times of Newton, stepping and the default for every cell, with gradients."""
    B, T, D = sizes.cells
    x = Input((B, T, D), "float32")
    for cell in CELLS:
        for algorithm in (None, "sequential", "newton"):
            layer = getattr(seqjax.layers, cell)(D, algorithm=algorithm)
            shapes = jax.eval_shape(layer.init, jax.random.key(0))
            leaves, tree = jax.tree.flatten(shapes)
            scale = D**-0.5
            params = [Input(p.shape, str(p.dtype), (-scale, scale)) for p in leaves]

            def run(*args: jax.Array, layer: Any = layer, tree: Any = tree) -> jax.Array:
                return layer.apply(jax.tree.unflatten(tree, args[:-1]), args[-1])[0]

            name = f"{cell} {[B, T, D]} float32, {algorithm or 'default'}, with gradients"
            yield Job("newton", name, with_gradients(run), (*params, x), _timed)


def _timed(compiled: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"ms": milliseconds(compiled, args), "temporaries MiB": temporaries / 2**20}


def train_jobs(sizes: Sizes, peak: float | None) -> Iterator[Job]:
    """Yield training steps of four language models with Adam, in bfloat16."""
    vocabulary, dim, depth, batch, length = sizes.model
    layers = {
        "DeltaNet": seqjax.layers.DeltaNet(dim=dim, heads=max(1, dim // 128), gated=True),
        "Mamba": seqjax.layers.Mamba(dim=dim),
        "LRU": seqjax.layers.LRU(dim=dim),
        "GateLoop": seqjax.layers.GateLoop(dim=dim, heads=max(1, dim // 64)),
    }
    for name, layer in layers.items():
        backbone = seqjax.models.Backbone(layer, depth=depth, scan=True, remat=True)
        model = seqjax.models.LanguageModel(vocabulary, backbone, dtype="bfloat16")

        def step(params: Any, first: Any, second: Any, x: jax.Array, model: Any = model) -> Any:
            def loss_of(params: Any) -> jax.Array:
                logits = jax.nn.log_softmax(model.apply(params, x[:, :-1])[0])
                return -jnp.take_along_axis(logits, x[:, 1:, None], axis=-1).mean()

            loss, grads = jax.value_and_grad(loss_of)(params)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, grads)
            new = jax.tree.map(
                lambda p, m, v: p - 1e-3 * m / (v**0.5 + 1e-8), params, first, second
            )
            return new, first, second, loss

        def measure(compiled: Any, args: tuple[Any, ...], model: Any = model) -> dict[str, Any]:
            del args
            params = jax.jit(model.init)(jax.random.key(0))
            zeros = jax.tree.map(jnp.zeros_like, params)
            tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)
            ms = milliseconds(compiled, (params, zeros, zeros, tokens), budget=2.0)
            count = sum(x.size for x in jax.tree.leaves(params))
            rate = batch * length / ms * 1e3
            row = {"ms": ms, "tokens/s": rate, "parameters": count}
            return row | ({"6N MFU": 6 * count * rate / peak} if peak else {})

        shapes = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
        label = f"{name}, width {dim}, depth {depth}, {batch} x {length} tokens"
        yield Job("train", label, step, (shapes, shapes, shapes, tokens), measure)


def compile_job(job: Job) -> Any:
    """Compile the program of a job."""
    specs = [x.spec() if isinstance(x, Input) else x for x in job.inputs]
    return jax.jit(job.run).lower(*specs).compile()


class Report:
    """The JSON file and the printed table, both written row by row."""

    def __init__(self, path: pathlib.Path, environment: dict[str, Any]) -> None:
        self.path, self.environment, self.rows = path, environment, list[dict[str, Any]]()
        print(", ".join(f"{key} {value}" for key, value in environment.items()))
        print("\n| | | |\n|---|---|---|", flush=True)

    def add(self, section: str, name: str, **values: Any) -> None:
        """Add a row."""
        self.rows.append({"section": section, "name": name, **values})
        content = {"environment": self.environment, "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        cells = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        print(f"| {section} | {name} | {', '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return 1 if a program failed."""
    parser = argparse.ArgumentParser("python -m experiments.bench device", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose section or name contains this")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--output", default="device.json", help="the JSON file")
    options = parser.parse_args(argv)
    start = time.monotonic()
    return run_check(options, lambda: options.minutes * 60 - (time.monotonic() - start))


def run_check(options: argparse.Namespace, left: Callable[[], float]) -> int:
    """Compile the selected programs in threads, and run them one by one in the remaining time."""
    device, sizes = jax.devices()[0], TINY if options.tiny else FULL
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    environment = {"device": device.device_kind, "jax": jax.__version__, "date": now}
    report = Report(pathlib.Path(options.output), environment)
    peak = next((p for kind, p in PEAKS.items() if kind in device.device_kind), None)
    bandwidth: list[float] = []
    found = itertools.chain(
        correct_jobs(TINY if options.tiny else CORRECT),
        op_jobs(sizes, lambda: bandwidth[0]),
        newton_jobs(sizes),
        train_jobs(sizes, peak),
    )
    jobs = [job for job in found if options.only in f"{job.section} {job.name}"]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    programs = [pool.submit(compile_job, job) for job in jobs]
    concurrent.futures.wait(programs, timeout=left() / 2)
    pool.shutdown(wait=False, cancel_futures=True)
    x = jnp.ones((sizes.copy,), jnp.float32)
    ms = milliseconds(jax.jit(lambda x: x + 1.0), (x,))
    bandwidth.append(8 * sizes.copy / ms * 1e3)
    report.add("ceiling", "copy", ms=ms, **{"GB/s": bandwidth[0] / 1e9})
    failed = 0
    for job, program in zip(jobs, programs, strict=True):
        if not program.done() or program.cancelled() or left() < 0:
            report.add(job.section, job.name, error="no time left")
            continue
        try:
            given = [x.make(i) for i, x in enumerate(job.inputs) if isinstance(x, Input)]
            args = tuple(jax.device_put(x) for x in given)
            report.add(job.section, job.name, **job.measure(program.result(), args))
        except Exception as error:  # one row must not end the run
            failed += 1
            report.add(job.section, job.name, error=repr(error).split("\\n")[0][:200])
    return int(failed > 0)
