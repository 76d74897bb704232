"""Newton on dense cells: predicted time of an iteration against all sequential steps.

    JAX_PLATFORMS=cpu python -m experiments.bench dense --only=gpu    # pip install -e '.[aot-gpu]'
    JAX_PLATFORMS=cpu python -m experiments.bench dense --only=tpu    # pip install -e '.[aot]'

The programs are compiled ahead of time for an H100 and a v6e, and not run. The crossover is the
time of all sequential steps over that of one iteration: Newton is faster if it takes fewer
iterations. An iteration is the evaluation of the cell with its Jacobians and one linear recurrence.
Projection and the final check are left out, so the crossover favors Newton. Cycles on the TPU are
libtpu's estimates from before scheduling, see `experiments.compiled.tpu_schedule`.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import seqjax
from experiments.base.errors import installed_version
from experiments.bench.tools import ONLY, Table, answer, run_apart
from experiments.compiled import gpu_program, tpu_schedule
from experiments.compiled.chips import CHIPS
from seqjax import cells
from seqjax.ops.nonlinear import jacobian_structure
from seqjax.ops.nonlinear.affine_scan import correction

CHIP = "v6e"
B, T = 4, 1024
WIDTHS = (16, 64, 256)
FORMS = ("sequential", "dense", "quasi")
PLATFORMS = {
    "gpu": ("H100", "jax-cuda13-plugin", "aot-gpu", {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}),
    "tpu": (
        CHIP,
        "libtpu",
        "aot",
        {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    ),
}


def program(form: str, width: int) -> tuple[Callable[..., Any], list[Any]]:
    """Return all sequential steps of a GRU or one iteration of Newton, and argument shapes."""
    cell = cells.GRU(width)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype("float32"))
    params = {name: array(cell.param_shape(name)) for name in cell.recurrent}
    xs, state = array((B, T, cell.gates, width)), array((B, width))

    def steps(params: Any, xs: jax.Array, h0: jax.Array) -> Any:
        return seqjax.nonlinear_scan(cell, params, xs, h0, algorithm="sequential")[:2]

    def iteration(params: Any, xs: jax.Array, h0: jax.Array, guess: jax.Array) -> Any:
        def one(h: jax.Array, x: jax.Array) -> Any:
            return jacobian_structure.jacobian(lambda h: cell(params, h, x), h, form)

        before = jnp.concatenate([h0[:, None], guess[:, :-1]], axis=1)
        f, J = jax.vmap(jax.vmap(one))(before, xs)
        reset = jnp.zeros(guess.shape[:2], bool)
        return guess + correction(J, f - guess, reset, None)

    if form == "sequential":
        return steps, [params, xs, state]
    return iteration, [params, xs, state, array((B, T, width))]


def _compile(platform: str, width: int) -> str:
    """Return the predicted seconds and the temporaries of each form; runs in the worker."""
    place: jax.sharding.Sharding
    if platform == "gpu":
        from experiments.bench import gpu

        named = gpu.h100()
        place, mesh = named, named.mesh.abstract_mesh
    else:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(CHIPS[CHIP].topology, platform="tpu").devices[0]
        mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,), devices=[device])
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        mesh = mesh.abstract_mesh
    found: dict[str, list[float]] = {}
    for form in FORMS:
        run, shapes = program(form, width)
        args = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes
        )
        with jax.sharding.use_abstract_mesh(mesh):
            compiled = jax.jit(run).lower(*args).compile()
        text, memory = compiled.as_text() or "", compiled.memory_analysis()
        assert memory is not None
        if platform == "gpu":
            seconds = gpu_program.cost(text).seconds
        else:
            seconds = tpu_schedule.cost(text, {}, CHIPS[CHIP]).seconds
        found[form] = [seconds, memory.temp_size_in_bytes]
    return json.dumps(found)


def bench_dense(rounds: int) -> None:
    """Print predicted times and crossovers for a GRU."""
    del rounds  # nothing is timed
    for platform, (chip, package, extra, env) in PLATFORMS.items():
        if not platform.startswith(ONLY.value):
            continue
        print(f"{package} {installed_version(package, extra)}, compiled ahead of time, not run")
        title = f"GRU, [{B}, {T}, D], float32, {chip}: iterations up to which Newton is faster"
        table = Table(title)
        for width in WIDTHS:
            with tempfile.TemporaryDirectory() as folder:
                request, place = (platform, width), pathlib.Path(folder)
                found = json.loads(run_apart("experiments.bench.dense", request, place, env))
            seconds, memory = ({form: found[form][part] for form in FORMS} for part in (0, 1))
            values: dict[str, float | str] = {
                "sequential, ms": seconds["sequential"] * 1e3,
                "exact iteration, ms": seconds["dense"] * 1e3,
                "quasi iteration, ms": seconds["quasi"] * 1e3,
                "exact: crossover": f"{seconds['sequential'] / seconds['dense']:.3g}",
                "quasi: crossover": f"{seconds['sequential'] / seconds['quasi']:.3g}",
                "exact: temporaries, MiB": f"{memory['dense'] / 2**20:.0f}",
                "quasi: temporaries, MiB": f"{memory['quasi'] / 2**20:.0f}",
            }
            table.row(f"D={width}", values)


if __name__ == "__main__":
    answer(_compile)
