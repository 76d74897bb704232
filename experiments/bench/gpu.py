"""Resources of GPU kernels and predicted times of XLA programs, compiled without a GPU.

    JAX_PLATFORMS=cpu python -m experiments.bench gpu        # pip install -e '.[aot-gpu]'
    JAX_PLATFORMS=cpu python -m experiments.bench gpu --only="xla delta_rule"

A separate process compiles each program ahead of time for an H100. The first table shows whether a
kernel compiles and fits: registers, spills and shared memory. The second table predicts the time of
the matrix-state ops from the kernels of their programs (`experiments.compiled.gpu_program`). It
does not count matmuls inside our own kernels, so the rows "pallas" are lower bounds. Its last
columns compare the prediction of XLA's form with an H100, for the programs of an earlier commit.
"""

import functools
import itertools
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import seqjax
from experiments.base.errors import installed_version
from experiments.bench import tpu
from experiments.bench.tools import ONLY, Table, answer, run_apart
from experiments.compiled import gpu_program

# Description of an H100 SXM in XLA's format, with the fields that the compiler reads.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SHARED_PER_CORE = 233472  # bytes of shared memory for the thread blocks of a multiprocessor
# A row that the TPU suite lacks: too few sequences to fill the chip, so thread blocks split time.
_FEW = tpu.Row("linear_scan", tpu.linear(1, 2048), 8192)


def _nonlinear_rows() -> dict[str, tpu.Row]:
    both = ("float32", "bfloat16")
    forward = tpu.nonlinear(seqjax.cells.ParaGRU(2560), 8, 4096, both)
    forward |= tpu.nonlinear(seqjax.cells.ParaLSTM(2560), 8, 4096, both)
    forward |= tpu.nonlinear(seqjax.cells.GRU(64), 64, 1024, both)
    forward |= tpu.nonlinear(seqjax.cells.LSTM(128), 64, 1024, both[1:])  # the only one that fits
    made = {}
    for name, row in forward.items():
        made[name] = row
        made[name.replace(",", " backward,", 1)] = row._replace(backward=True)
    return made


MATRIX = {  # the forms with a kernel
    name: row._replace(dtypes=("bfloat16",)) if name.startswith("delta_rule, decay per c") else row
    for name, row in tpu.ROWS.items()
    if row.op in ("linear_attention", "delta_rule", "generalized_delta_rule") and ":" not in name
}
ROWS = {
    name: row for name, row in tpu.ROWS.items() if row.op in ("linear_scan", "selective_scan")
} | {
    "linear_scan, B=1, T=8192, D=2048": _FEW,
    "linear_scan backward, B=1, T=8192, D=2048": _FEW._replace(backward=True),
}
ROWS |= _nonlinear_rows() | MATRIX


class Program(NamedTuple):
    """A program whose time is predicted, for [4, 2048, 16, 128] in bfloat16.

    Attributes:
      op: name of an op of seqjax.

      decay: None, "per head" or "per channel".

      gradients: True for the gradients of all arguments, with the forward pass.

      measured: milliseconds on an H100 at commit c7daf83, or None.

      predicted: predicted milliseconds of the program of that commit, or None.

      implementation: "xla" or "pallas".
    """

    op: str
    decay: str | None
    gradients: bool
    measured: float | None = None
    predicted: float | None = None
    implementation: str = "xla"

    @property
    def name(self) -> str:
        """The name of the row."""
        form = "no decay" if self.decay is None else f"decay {self.decay}"
        way = ", with gradients" if self.gradients else ""
        return f"{self.implementation} {self.op}, {form}{way}"


MATRIX_SIZES = (4, 2048, 16, 128)  # B, T, H, and K = V
PROGRAMS: tuple[Program, ...] = (
    Program("linear_attention", "per head", False, 2.409, 2.07),
    Program("linear_attention", "per head", True, 7.636, 6.17),
    Program("linear_attention", "per channel", False, 3.856, 3.46),
    Program("linear_attention", "per channel", True, 14.95, 13.93),
    Program("delta_rule", "per head", False, 4.988, 5.38),
    Program("delta_rule", "per head", True, 16.10, 14.48),
    Program("delta_rule", "per channel", False, 6.859, 7.18),
    Program("delta_rule", "per channel", True, 24.34, 23.24),
    Program("generalized_delta_rule", "per channel", False),
    Program("generalized_delta_rule", "per channel", True),
)
PROGRAMS += tuple(
    Program(row.op, row.decay, row.gradients, implementation="pallas") for row in PROGRAMS
)


class Report(NamedTuple):
    """Resources of a program's kernels.

    Attributes:
      registers: registers per thread, the maximum over kernels.

      spills: bytes of spill stores and loads per thread, the sum over kernels.

      shared: bytes of shared memory per thread block, the maximum over kernels.
    """

    registers: int
    spills: int
    shared: int


def h100() -> jax.sharding.NamedSharding:
    """Return a sharding over one H100; lower programs under the abstract mesh of its mesh."""
    return single_gpu("h100", H100)


def single_gpu(name: str, description: str) -> jax.sharding.NamedSharding:
    """Return a sharding over one GPU with a given description in XLA's format."""
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology="1x1x1", target_config=description
    ).devices
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,), devices=devices[:1])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _compile(name: str, dtype: str) -> str:
    """Return the text of the compiled program; runs in the worker process."""
    place = h100()
    run, shapes = tpu.program(ROWS[name], ROWS[name].length, dtype, "pallas")
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        return jax.jit(run).lower(*args).compile().as_text() or ""


def _compile_program(op: str, decay: str | None, gradients: bool, implementation: str) -> str:
    """Return the text and the temporaries of a compiled program; runs in the worker process."""
    place = h100()
    array = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    row, gate = array(MATRIX_SIZES, jnp.bfloat16), array(MATRIX_SIZES[:3], jnp.float32)
    given = {"q": row, "k": row, "v": row}
    if op == "delta_rule":
        given["beta"] = gate
    if op == "generalized_delta_rule":
        given |= {"a": row, "b": row}
    if decay is not None:
        given["log_decay"] = gate if decay == "per head" else array(MATRIX_SIZES, jnp.float32)

    def run(given: dict[str, jax.Array]) -> jax.Array:
        return getattr(seqjax, op)(**given, implementation=implementation)[0]

    def loss(given: dict[str, jax.Array]) -> jax.Array:
        return 1e-3 * jnp.sum(run(given).astype(jnp.float32) ** 2)

    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(loss) if gradients else run).lower(given).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return f"{memory.temp_size_in_bytes}\n{compiled.as_text() or ''}"


def compile_program_apart(row: Program, folder: pathlib.Path) -> tuple[float, gpu_program.Cost]:
    """Compile a program in a separate process; return the bytes of temporaries and the cost."""
    env = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    request = (*row[:3], row.implementation)
    temporaries, _, text = run_apart("experiments.bench.gpu", request, folder, env).partition("\n")
    return float(temporaries), gpu_program.cost(text)


def _respond(*request: Any) -> str:
    return _compile(*request) if len(request) == 2 else _compile_program(*request)


def compile_apart(name: str, dtype: str, folder: pathlib.Path) -> Report:
    """Compile a program in a separate process and read the ptxas report of its kernels.

    The process needs no GPU; an environment variable turns off the check for one.
    """
    env = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    run_apart("experiments.bench.gpu", (name, dtype), folder, env)

    def numbers(pattern: str, reports: str) -> list[int]:
        said = [path.read_text() for path in folder.glob(reports)]
        found = [int(number) for text in said for number in re.findall(pattern, text)]
        if not found:
            raise ValueError(f"bench: no {pattern!r} in {reports}")
        return found

    return Report(
        registers=max(numbers(r"Used (\d+) registers", "*.ptxas")),
        # Not the warning, which has the same numbers.
        spills=sum(numbers(r"stack frame, (\d+) bytes spill", "*.ptxas"))
        + sum(numbers(r"stack frame, \d+ bytes spill stores, (\d+)", "*.ptxas")),
        shared=max(numbers(r"dynamic_shared_memory_size %c(\d+)_i32", "*.mlir-passes.log")),
    )


def bench_gpu(rounds: int) -> None:
    """Print registers, spills and shared memory of each kernel, and predicted times of XLA."""
    del rounds  # nothing is timed
    plugin = installed_version("jax-cuda13-plugin", "aot-gpu")
    print(f"jax-cuda13-plugin {plugin}, no GPU: compiled ahead of time for H100")
    table = Table("Kernels for H100; compiled, not run")
    for name, dtype in itertools.product(ROWS, ("float32", "bfloat16")):
        by_dtype = name in MATRIX or ROWS[name].op == "nonlinear_scan"
        left_out = by_dtype and dtype not in ROWS[name].dtypes
        if left_out or not name.startswith(ONLY.value):
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = compile_apart(name, dtype, pathlib.Path(folder))
        blocks = SHARED_PER_CORE // (report.shared + 1024)  # the system uses 1 KiB per block
        values: dict[str, Any] = {
            "registers a thread": report.registers,
            "spilled bytes": report.spills,
            "shared memory, KiB": f"{report.shared / 1024:.1f}",
            "blocks a multiprocessor": blocks,
        }
        table.row(f"{name}, {dtype}", values)
    _bench_programs()


def _bench_programs() -> None:
    table = Table("Matrix-state ops on H100, [4, 2048, 16, 128] bf16; predicted, not run")
    for row in PROGRAMS:
        if not row.name.startswith(ONLY.value):
            continue
        with tempfile.TemporaryDirectory() as folder:
            temporaries, cost = compile_program_apart(row, pathlib.Path(folder))
        flops = ", ".join(f"{kind} {count / 1e9:.0f}" for kind, count in cost.flops.items())
        values: dict[str, Any] = {
            "kernels": cost.kernels,
            "GB moved": cost.bytes / 1e9,
            "GFLOP of matmuls": flops,
            "predicted, ms": cost.seconds * 1e3,
            "temporaries, MiB": f"{temporaries / 2**20:.0f}",
        }
        if row.measured is not None and row.predicted is not None:
            values["c7daf83: predicted, ms"] = row.predicted
            values["c7daf83: measured, ms"] = row.measured
            values["c7daf83: ratio"] = row.predicted / row.measured
        table.row(row.name, values)


if __name__ == "__main__":
    answer(_respond)
