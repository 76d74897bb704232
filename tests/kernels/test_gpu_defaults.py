"""Default algorithms and kernels on GPU, read from programs that are lowered for CUDA on a CPU.

A CPU has no compute capability, so the tests give one. `test_aot_gpu` has that of an H100.
"""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import seqjax
from pallas_kernels.linear_scan import faster_on_gpu
from seqjax.ops.core import jax_compat
from tests.kernels.gpu import KERNEL

HOPPER, AMPERE, BLACKWELL, UNKNOWN = (9, 0), (8, 0), (10, 0), None
LOOP = "stablehlo.while"


@pytest.fixture
def on(monkeypatch):
    """Set the compute capability of the GPUs that programs are lowered for."""
    return lambda capability: monkeypatch.setattr(jax_compat, "_capability", lambda _: capability)


def lowered(run, *shapes, dtype="float32"):
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    # A new function for each call, because JAX caches lowered programs.
    return (
        jax.jit(lambda *args: run(*args))
        .trace(*given)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


def linear(shape, gradients=False, dtype="float32", **keywords):
    run = functools.partial(seqjax.linear_scan, **keywords)
    back = jax.grad(lambda a, x: jnp.sum(run(a, x)[0].astype(jnp.float32)), argnums=(0, 1))
    return lowered(back if gradients else run, shape, shape, dtype=dtype)


def selective(width=128, states=2, gradients=False, **keywords):
    run = functools.partial(seqjax.selective_scan, **keywords)
    shapes = [(2, 32, width), (2, 32, width), (width, states), (2, 32, states), (2, 32, states)]
    back = jax.grad(lambda *args: jnp.sum(run(*args)[0]), argnums=tuple(range(5)))
    return lowered(back if gradients else run, *shapes)


@pytest.mark.parametrize("program", [functools.partial(linear, (2, 32, 128)), selective])
def test_kernels_are_the_default_on_hopper_only(program, on):
    on(HOPPER)
    assert program().count(KERNEL) == 1
    assert program(gradients=True).count(KERNEL) == 2
    assert KERNEL not in program(implementation="xla")
    for other in (AMPERE, BLACKWELL, UNKNOWN):
        on(other)
        assert KERNEL not in program()
        assert KERNEL not in program(gradients=True)
    on(BLACKWELL)
    assert program(implementation="pallas").count(KERNEL) == 1
    on(AMPERE)
    with pytest.raises(NotImplementedError, match=r"must have .* 9.0 \(Hopper\) or newer, got 8.0"):
        program(implementation="pallas")


@pytest.mark.parametrize(
    "program",
    [
        functools.partial(linear, (2, 32, 6)),
        functools.partial(linear, (2, 32, 132), dtype="bfloat16"),
        functools.partial(linear, (2, 32, 128), dtype="float16"),
        functools.partial(linear, (2, 7, 128)),
        functools.partial(linear, (1, 1031, 128)),
        functools.partial(linear, (2, 32, 256), block_sizes=(16, 256)),
        functools.partial(linear, (2, 32, 128), algorithm="associative"),
        functools.partial(selective, 6),
        functools.partial(selective, 128, 17),
        functools.partial(selective, decay="signed"),
        functools.partial(selective, block_sizes=(64, 128)),
    ],
    ids=[
        "rows of 24 bytes",
        "rows of 264 bytes",
        "float16",
        "few steps",
        "one thread block",
        "block sizes",
        "associative",
        "selective_scan, rows of 24 bytes",
        "selective_scan, 17 states",
        "selective_scan, signed decays",
        "selective_scan, block sizes",
    ],
)
def test_calls_that_the_kernels_do_not_take_use_xla(program, on):
    """Check forward and backward programs: no kernel and no error."""
    on(HOPPER)
    assert KERNEL not in program()
    assert KERNEL not in program(gradients=True)


def test_few_thread_blocks_with_many_steps_use_xla():
    assert faster_on_gpu(8, 4096, 2560)
    assert faster_on_gpu(1, 65536, 512)  # 64 pieces of 1024 steps
    assert not faster_on_gpu(1, 65535, 512)  # cannot be split
    assert faster_on_gpu(11, 65535, 512)  # 44 thread blocks


@pytest.mark.parametrize(("manual", "kernels"), [(True, 1), (False, 0)], ids=["shard_map", "jit"])
def test_kernels_on_several_gpus(manual, kernels, on):
    on(HOPPER)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    spec = PartitionSpec("data")

    def run(a, x):
        return seqjax.linear_scan(a, x)[0]

    if manual:
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    given = [jax.ShapeDtypeStruct((4, 32, 128), "float32", sharding=sharding)] * 2
    program = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
    assert program.as_text().count(KERNEL) == kernels


@pytest.mark.parametrize(
    ("versions", "export", "expected"),
    [
        (["9.0"], False, HOPPER),
        (["9.0", "8.0"], False, AMPERE),
        (["10.0"], False, BLACKWELL),
        (["9.0"], True, UNKNOWN),
        ([None], False, UNKNOWN),
    ],
    ids=["hopper", "mixed", "blackwell", "export", "cpu"],
)
def test_the_capability_that_is_lowered_for(versions, export, expected):
    devices = [
        types.SimpleNamespace(**({"compute_capability": text} if text else {})) for text in versions
    ]
    module = types.SimpleNamespace(
        backend=types.SimpleNamespace(devices=lambda: devices),
        lowering_parameters=types.SimpleNamespace(for_export=export),
    )
    assert jax_compat._capability(module) == expected


def test_xla_is_associative_up_to_a_bound(on):
    on(AMPERE)
    assert LOOP not in linear((1, 65536, 4))
    assert LOOP not in linear((1, 65536, 4), gradients=True)
    assert LOOP not in linear((2, 2**15, 2**13))  # 2 GiB of states
    assert LOOP in linear((2, 2**15, 2**13 + 4))
    assert LOOP in linear((2, 2**15, 2**13 + 4), dtype="bfloat16")  # states are float32


CELLS = {"dense": seqjax.cells.GRU(8), "elementwise": seqjax.cells.ParaGRU(8)}


@pytest.mark.quick("dense-values")
@pytest.mark.parametrize("gradients", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("kind", CELLS)
def test_dense_cells_step(kind, gradients, on):
    on(HOPPER)
    cell = CELLS[kind]
    layer = {"dense": seqjax.layers.GRU, "elementwise": seqjax.layers.ParaGRU}[kind]

    def program(algorithm):
        made = layer(dim=cell.dim, algorithm=algorithm)
        params = jax.eval_shape(made.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, 16, cell.dim), jnp.float32)

        def run(params, x):
            return jnp.sum(made.apply(params, x)[0])

        run = jax.grad(run, argnums=(0, 1)) if gradients else run
        return jax.jit(run).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()

    same = "sequential" if kind == "dense" else "newton"
    other = "newton" if kind == "dense" else "sequential"
    assert program(None).count(LOOP) == program(same).count(LOOP)
    assert program(None).count(LOOP) != program(other).count(LOOP)
