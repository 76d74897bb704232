"""Bytes, cycles and predicted time of TPU kernels, compiled without a TPU.

    python -m experiments.bench tpu        # pip install -e '.[aot]', libtpu >= 0.0.51

A separate process compiles each program ahead of time, twice. The program of full length gives the
bytes moved. A program of an eighth of the length gives the cycles of the kernels, which are the
same for every step. `experiments.compiled.tpu_schedule` reads both.
"""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

import seqjax
from experiments.base.errors import installed_version
from experiments.bench.tools import ONLY, Table, answer, run_apart
from experiments.compiled import tpu_schedule
from experiments.compiled.chips import CHIPS

Shapes = dict[str, Any]  # trees of jax.ShapeDtypeStruct
Blocks = tuple[int, int] | None  # by default chosen by the op


class Row(NamedTuple):
    """A program whose cost is predicted.

    Attributes:
      op: name of an op of seqjax.

      shapes: (T, dtype) -> shapes of the arguments by name.

      length: T.

      backward: True for the backward pass alone, from the residuals of the forward pass.

      dtypes: dtypes to compile for.

      chips: chips to compile for.

      keywords: keyword arguments of the op.

      xla: whether the XLA form is compiled too.
    """

    op: str
    shapes: Callable[[int, str], Shapes]
    length: int
    backward: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    chips: tuple[str, ...] = ("v5e", "v6e")
    keywords: tuple[tuple[str, Any], ...] = ()
    xla: bool = True


def linear(B: int, D: int) -> Callable[[int, str], Shapes]:
    """Return a function for the argument shapes of `linear_scan`."""

    def shapes(T: int, dtype: str) -> Shapes:
        array = jax.ShapeDtypeStruct((B, T, D), jnp.dtype(dtype))
        return {"decay": array, "x": array}

    return shapes


def _selective(B: int, D: int, N: int) -> Callable[[int, str], Shapes]:
    def shapes(T: int, dtype: str) -> Shapes:
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
        weight = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype("float32"))
        timed = {"x": array((B, T, D)), "dt": array((B, T, D))}
        return timed | {
            "A": weight((D, N)),
            "B": array((B, T, N)),
            "C": array((B, T, N)),
            "D": weight((D,)),
        }

    return shapes


def _matrix(
    op: str, decay: str | None, H: int = 8, K: int = 128, V: int = 128
) -> Callable[[int, str], Shapes]:
    """Return a function for shapes of one sequence; gates are float32."""
    B = 1

    def shapes(T: int, dtype: str) -> Shapes:
        array = jax.ShapeDtypeStruct((B, T, H, K), jnp.dtype(dtype))
        gate = jax.ShapeDtypeStruct((B, T, H), jnp.dtype("float32"))
        made = {"q": array, "k": array, "v": array.update(shape=(B, T, H, V))}
        if op == "delta_rule":
            made["beta"] = gate
        if op == "generalized_delta_rule":
            made |= {"a": array, "b": array}
        if decay is not None:
            made["log_decay"] = gate if decay == "per head" else array.update(dtype=gate.dtype)
        return made

    return shapes


def _kda(H: int, T: int, dtype: str) -> Shapes:
    """Return the shapes of Kimi Delta Attention, whose norms and gate are in the kernel."""
    made = _matrix("delta_rule", "per channel", H=H)(T, dtype)
    made["log_decay"] = made["log_decay"].update(dtype=jnp.dtype(dtype))
    shapes: tuple[Any, Any] = (
        jax.ShapeDtypeStruct((H,), jnp.dtype("float32")),
        jax.ShapeDtypeStruct((H, 128), jnp.dtype("float32")),
    )
    return made | {"gate": seqjax.ops.SoftplusGate(*shapes)}


def nonlinear(cell: seqjax.cells.Cell, B: int, T: int, dtypes: tuple[str, ...]) -> dict[str, Row]:
    """Return the row of a cell by name. Parameters and state are float32."""

    def shapes(T: int, dtype: str) -> Shapes:
        weight = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype("float32"))
        return {
            "params": {name: weight(cell.param_shape(name)) for name in cell.recurrent},
            "xs": jax.ShapeDtypeStruct((B, T, cell.gates, cell.dim), jnp.dtype(dtype)),
            "initial_state": jax.eval_shape(lambda: cell.initial_state(B)),
        }

    row = Row("nonlinear_scan", shapes, T, dtypes=dtypes, chips=("v5e",))
    name = f"nonlinear_scan, {type(cell).__name__}, B={B}, T={T}, D={cell.dim}"
    return {name: row._replace(keywords=(("cell", cell),))}


def _cell_rows() -> dict[str, Row]:
    """Return rows of cells with matrices. The XLA form is the loop over steps."""
    made: dict[str, Row] = {}
    for cell in (seqjax.cells.GRU(512), seqjax.cells.LSTM(512)):
        made |= nonlinear(cell, 64, 1024, ("bfloat16",))
    return made


def _matrix_rows() -> dict[str, Row]:
    made = {}
    for op in ("linear_attention", "delta_rule"):
        for decay in (None, "per head", "per channel"):
            form = f"{'no decay' if decay is None else 'decay ' + decay}, B=1, T=4096, H=8, K=V=128"
            dtypes = ("float32", "bfloat16") if decay else ("bfloat16",)
            row = Row(op, _matrix(op, decay), 4096, dtypes=dtypes)
            made[f"{op}, {form}"] = row
            if decay is not None:
                made[f"{op} backward, {form}"] = row._replace(backward=True, dtypes=dtypes[-1:])
    own = {
        "generalized_delta_rule, decay per channel, B=1, T=4096, H=8, K=V=128": _matrix(
            "generalized_delta_rule", "per channel"
        ),
        "RWKV-7: generalized_delta_rule, decay per channel, B=1, T=4096, H=32, K=V=64": _matrix(
            "generalized_delta_rule", "per channel", H=32, K=64, V=64
        ),
        "Mamba-2: linear_attention, decay per head, B=1, T=4096, H=24, K=128, V=64": _matrix(
            "linear_attention", "per head", H=24, V=64
        ),
    }
    for name, shapes in own.items():
        op = "linear_attention" if "linear_attention" in name else "generalized_delta_rule"
        row = Row(op, shapes, 4096, dtypes=("bfloat16",))
        made[name] = row
        made[name.replace(f"{op},", f"{op} backward,")] = row._replace(backward=True)
    for H in (32, 16):  # all heads, and those of one of the two cores of a v7x
        name = f"KDA: delta_rule, norms and gate per channel, B=1, T=8192, H={H}, K=V=128"
        row = Row("delta_rule", functools.partial(_kda, H), 8192, dtypes=("bfloat16",))
        row = row._replace(chips=("v7x",), xla=False, keywords=(("normalize", True),))
        made[name] = row
        made[name.replace("rule,", "rule backward,")] = row._replace(backward=True)
    return made


ALL = ("v5e", "v6e", "v7x")
ROWS = {
    "linear_scan, B=8, T=4096, D=2560": Row("linear_scan", linear(8, 2560), 4096, chips=ALL),
    "linear_scan backward, B=8, T=4096, D=2560": Row(
        "linear_scan", linear(8, 2560), 4096, backward=True, chips=ALL
    ),
    "linear_scan, B=8, T=4096, D=1000": Row("linear_scan", linear(8, 1000), 4096),
    "linear_scan, B=8, T=4097, D=1000": Row("linear_scan", linear(8, 1000), 4097),
    "selective_scan, B=8, T=4096, D=2048, N=16": Row(
        "selective_scan", _selective(8, 2048, 16), 4096
    ),
    # One dtype and chip only: libtpu writes 13 GB in minutes for the schedule. The XLA form takes
    # as long to compile.
    "selective_scan backward, B=8, T=4096, D=2048, N=16": Row(
        "selective_scan",
        _selective(8, 2048, 16),
        4096,
        backward=True,
        dtypes=("float32",),
        chips=("v5e",),
        xla=False,
    ),
    **_cell_rows(),
    **_matrix_rows(),
}


def program(
    row: Row, length: int, dtype: str, implementation: str, block_sizes: Blocks = None
) -> tuple[Any, list[Any]]:
    """Return the function of a row, which takes arrays, and the shapes of its arguments."""
    shapes = row.shapes(length, dtype)
    keywords = dict(row.keywords) | ({} if block_sizes is None else {"block_sizes": block_sizes})
    op = functools.partial(getattr(seqjax, row.op), implementation=implementation, **keywords)

    def run(*arrays: Any) -> Any:
        return op(**dict(zip(shapes, arrays, strict=True)))[:2]  # without the SolveInfo

    if not row.backward:
        return run, list(shapes.values())
    out, pull = jax.eval_shape(functools.partial(jax.vjp, run), *shapes.values())
    kept, tree = jax.tree.flatten(pull)

    def back(kept: list[jax.Array], cotangents: Any) -> Any:
        return jax.tree.unflatten(tree, kept)(cotangents)

    return back, [kept, out]


def _compile(
    name: str, dtype: str, chip: str, implementation: str, block_sizes: Blocks, length: int
) -> str:
    """Return the text of the compiled program; runs in the worker process."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(CHIPS[chip].topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def rows(s: Any) -> Format:
        """Return the row-major layout, which kernels require.

        By default the compiler may transpose the arguments of a program to reduce padding. The
        cost would then include transposing them back.
        """
        return Format(Layout(tuple(range(s.ndim))), place)

    run, shapes = program(ROWS[name], length, dtype, implementation, block_sizes)
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows(s)), shapes)
    results = jax.tree.map(rows, jax.eval_shape(run, *shapes))
    return jax.jit(run, out_shardings=results).lower(*args).compile().as_text() or ""


def compile_apart(
    *request: Any,
    module: str = "experiments.bench.tpu",
    folder: pathlib.Path,
    flags: str = "",
    may_crash: bool = False,
) -> str:
    """Run `module` in a separate process, because libtpu reads its flags only once.

    With `may_crash`, a crash of the process is no error: libtpu's profiler crashes on some
    kernels after it has written their schedule.
    """
    env = {
        "LIBTPU_INIT_ARGS": flags.replace("DIR", str(folder)),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return run_apart(module, request, folder, env, may_crash=may_crash)


def measure(
    name: str, dtype: str, chip: str, implementation: str, block_sizes: Blocks = None
) -> dict[str, float]:
    """Return the ideal bytes and the bytes, cycles and seconds of the compiled program."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        request = (name, dtype, chip, implementation, block_sizes)
        ask = functools.partial(compile_apart, *request, folder=folder)
        kernels: dict[str, tpu_schedule.Kernel] = {}
        if implementation == "xla":
            try:
                whole = ask(row.length, flags=tpu_schedule.PROFILE)
            except RuntimeError:  # the profiler crashes on some operations
                whole = ask(row.length)
        else:
            whole = ask(row.length)
        names = tpu_schedule.kernel_names(whole)
        if names:
            short = -(-row.length // 8)
            ask(short, flags=tpu_schedule.FLAGS, may_crash=True)
            for kernel in names:
                read = tpu_schedule.read_kernel(folder, kernel)
                kernels[kernel] = tpu_schedule.Kernel(*(n * row.length / short for n in read))
        found = tpu_schedule.cost(whole, kernels, CHIPS[chip])
    return {"ideal": tpu_schedule.ideal_bytes(whole), **found._asdict()}


def bench_tpu(rounds: int) -> None:
    """Print the predicted times of kernels and of XLA relative to the roofline."""
    del rounds  # nothing is timed
    print(f"libtpu {installed_version('libtpu', 'aot')}, no TPU: compiled ahead of time")
    table = Table("Predicted on one chip; the roofline is every argument and result moved once")
    for name, row in ROWS.items():
        if not name.startswith(ONLY.value):
            continue
        for dtype, chip in itertools.product(row.dtypes, row.chips):
            at = CHIPS[chip]
            kernel = measure(name, dtype, chip, "pallas")
            roofline = kernel["ideal"] / at.bandwidth
            values: dict[str, float | str] = {
                "roofline, ms": f"{roofline * 1e3:.3f}",
                "kernel, ms": f"{kernel['seconds'] * 1e3:.3f}",
                "kernel: bytes / ideal": kernel["bytes"] / kernel["ideal"],
                "kernel: cycles / roofline": kernel["cycles"] / at.clock / roofline,
                "kernel: time / roofline": kernel["seconds"] / roofline,
            }
            xla = measure(name, dtype, chip, "xla") if row.xla else None
            values["XLA: time / roofline"] = xla["seconds"] / roofline if xla else "not compiled"
            table.row(f"{name}, {dtype}, {chip}", values)


if __name__ == "__main__":
    answer(_compile)
