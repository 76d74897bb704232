"""Every kernel, forward and backward, compiled for TPU by the TPU compiler, without a TPU.

A kernel that does not fit the chip's memory or is not lowered fails to compile. Needs libtpu: the
extra `aot`.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import seqjax
from seqjax import cells, sharding

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiles for TPU ahead of time: pip install -e '.[aot]'",
    ),
]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
B, T, D = 8, 4096, 2560
KERNEL = 'custom_call_target="tpu_custom_call"'


@functools.cache
def devices(chip):
    """Return the devices of a topology, or of the smallest topology of a chip."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is not in Google's cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the tests run in several processes
    return topologies.get_topology_desc(CHIPS.get(chip, chip), platform="tpu").devices


def compiled(chip, run, shapes):
    """Compile `run` and its reverse pass in one program, for one chip."""
    place = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)

    def both(args):
        out, pull = jax.vjp(run, args)
        return out, pull(out)

    return jax.jit(both).lower(args).compile()


def linear_scan(dtype, length=T, width=D, decay=(B, T, D), **keywords):
    def run(arrays):
        return seqjax.linear_scan(**arrays, implementation="pallas", **keywords)

    shapes = {
        "decay": jax.ShapeDtypeStruct(decay, dtype),
        "x": jax.ShapeDtypeStruct((B, length, width), dtype),
        "initial_state": jax.ShapeDtypeStruct((B, width), jnp.promote_types(dtype, jnp.float32)),
    }
    return run, shapes


def selective_scan(dtype, width=2048, states=16):
    def run(arrays):
        return seqjax.selective_scan(**arrays, implementation="pallas")

    float32, data = jnp.dtype("float32"), jnp.dtype(dtype)
    shapes = {"x": ((B, T, width), data), "dt": ((B, T, width), data)}
    shapes |= {"A": ((width, states), float32), "D": ((width,), float32)}
    shapes |= {"B": ((B, T, states), float32), "C": ((B, T, states), float32)}
    return run, {name: jax.ShapeDtypeStruct(*given) for name, given in shapes.items()}


def matrix(op, decay, dtype, B=1, T=8192, H=16, K=128, V=128, reset=None):
    """Return a matrix-state op and the shapes of its inputs; `decay` is "BTH" or "BTHK"."""

    def run(arrays):
        return getattr(seqjax, op)(**arrays, implementation="pallas", reset=reset)

    sizes = {"B": B, "T": T, "H": H, "K": K, "V": V}
    axes = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "log_decay": decay, "initial_state": "BHKV"}
    axes |= {"beta": "BTH"} if op == "delta_rule" else {}
    axes |= {"a": "BTHK", "b": "BTHK"} if op == "generalized_delta_rule" else {}
    data = {name: dtype if name in "qkvab" else "float32" for name in axes}
    return run, {
        name: jax.ShapeDtypeStruct([sizes[a] for a in given], jnp.dtype(data[name]))
        for name, given in axes.items()
    }


def fused_delta_rule(dtype, decay="BTHK", T=8192, H=16, K=128):
    """Return the delta rule with norms and a gate inside the kernel."""
    _, shapes = matrix("delta_rule", decay, dtype, T=T, H=H, K=K)
    bias = (H,) if decay == "BTH" else (H, K)
    shapes["log_decay"] = shapes["log_decay"].update(dtype=jnp.dtype(dtype))
    shapes["gate"] = seqjax.ops.SoftplusGate(
        *(jax.ShapeDtypeStruct(shape, jnp.dtype("float32")) for shape in ((H,), bias))
    )

    def run(arrays):
        return seqjax.delta_rule(**arrays, normalize=True, implementation="pallas")

    return run, shapes


def nonlinear_scan(cell, dtype, batch=8, length=100):
    """Return the recurrence of a cell, with resets, and the shapes of its inputs."""
    reset = jnp.arange(length) % 10 == 3

    def run(arrays):
        keywords = {"reset": jnp.tile(reset, (batch, 1)), "implementation": "pallas"}
        return seqjax.nonlinear_scan(cell, **arrays, **keywords)[:2]

    xs = (batch, length, cell.gates, cell.dim)
    return run, {
        "params": {
            name: jax.ShapeDtypeStruct(cell.param_shape(name), jnp.float32)
            for name in cell.recurrent
        },
        "xs": jax.ShapeDtypeStruct(xs, jnp.dtype(dtype)),
        "initial_state": jax.eval_shape(lambda: cell.initial_state(batch)),
    }


# The kernels by name: dtype -> (function of a tree of arrays, their shapes); and, of temporary
# memory, how many times the arguments' it may take.
KERNELS = {
    "linear_scan": (linear_scan, 0.01),
    # A state for every 64 steps, and the cotangents of B and C by blocks of D, their N = 16
    # numbers padded to 128 lanes in memory: 0.62 times bfloat16 arguments.
    "selective_scan": (selective_scan, 0.7),
    # A state for every 128 steps: 0.66 times bfloat16 arguments, and what the compiler spills.
    "linear_attention": (functools.partial(matrix, "linear_attention", "BTH"), 1.0),
    "delta_rule": (functools.partial(matrix, "delta_rule", "BTH"), 1.0),
    # The input of the gate is half as large as logarithms in float32, and so are the arguments.
    "fused_delta_rule": (fused_delta_rule, 1.5),
    "generalized_delta_rule": (functools.partial(matrix, "generalized_delta_rule", "BTHK"), 1.0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, chip, dtype):
    make, temporaries = KERNELS[name]
    run, shapes = make(dtype)
    program = compiled(chip, run, shapes)
    assert program.as_text().count(KERNEL) >= 2
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= temporaries * memory.argument_size_in_bytes


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(linear_scan("complex64", 1024, 512, (B, 1024, 512)), id="complex"),
        pytest.param(linear_scan("float32", 1000, 1000, (1000, 1000)), id="shared over batch"),
        pytest.param(linear_scan("bfloat16", 1003, 100, (100,), reverse=True), id="ragged"),
        pytest.param(selective_scan("bfloat16", 1000, 5), id="selective, ragged"),
        pytest.param(
            matrix("delta_rule", "BTHK", "bfloat16", T=100, H=3, K=20, V=7), id="delta, ragged"
        ),
        pytest.param(
            matrix("linear_attention", "BTHK", "bfloat16", 2, 300, 12, 64, 64), id="attention"
        ),
        pytest.param(
            matrix("generalized_delta_rule", "BTH", "bfloat16", T=100, H=3, K=20, V=7),
            id="generalized, ragged",
        ),
    ],
)
def test_other_forms_compile(program):
    assert KERNEL in compiled("v6e", *program).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(nonlinear_scan(cells.GRU(256), "float32", 16), id="GRU"),
        pytest.param(nonlinear_scan(cells.Elman(20), "bfloat16", 1, 9), id="Elman, ragged"),
        # The largest matrices that fit into VMEM with their cotangents and blocks.
        pytest.param(nonlinear_scan(cells.LSTM(1024), "float32"), id="LSTM"),
        pytest.param(nonlinear_scan(cells.LSTM(512), "bfloat16", 300), id="LSTM, three blocks"),
        pytest.param(
            nonlinear_scan(cells.Headwise(cells.DenseSLSTM(128), 4), "bfloat16"), id="sLSTM"
        ),
        pytest.param(nonlinear_scan(cells.ParaLSTM(256), "bfloat16"), id="elementwise"),
    ],
)
def test_cells_compile(program):
    assert compiled("v5e", *program).as_text().count(KERNEL) == 2


def test_what_needs_most_memory_compiles():
    """Compile decays per channel in float32 for the chip with the least memory."""
    program = matrix("delta_rule", "BTHK", "float32", T=1024, H=8)
    assert KERNEL in compiled("v5p", *program).as_text()


def test_none_takes_the_kernel_on_one_chip():
    run, shapes = linear_scan("float32", 64, 128, (B, 64, 128))
    del run
    program = compiled("v5e", lambda arrays: seqjax.linear_scan(**arrays), shapes)
    assert KERNEL in program.as_text()


def test_none_leaves_to_xla_what_the_compiler_splits():
    """Check that split programs use XLA, and that a named kernel's error names `shard_map`."""
    mesh = jax.sharding.Mesh(devices("v5e"), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    place = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((B, 64, 128), jnp.float32, sharding=place)
    program = jax.jit(seqjax.linear_scan).lower(x, x).compile().as_text()
    assert KERNEL not in program
    asked = functools.partial(seqjax.linear_scan, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"jax\.shard_map"):
        jax.jit(asked).lower(x, x)
    local = jax.shard_map(asked, mesh=mesh, in_specs=spec, out_specs=spec)
    assert KERNEL in jax.jit(local).lower(x, x).compile().as_text()


def test_xla_is_xla():
    """Check that `implementation="xla"` contains no kernel."""
    _, shapes = selective_scan("float32", 128, 4)
    program = compiled("v5e", lambda a: seqjax.selective_scan(**a, implementation="xla"), shapes)
    assert KERNEL not in program.as_text()


@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
def test_a_mesh_splits_axes_of_the_torus(topology):
    """Check the mesh of the 131k recipes: eight shards of time are no axis of these slices."""
    chips = devices(topology)
    mesh = sharding.make_mesh("fsdp=-1,sequence=8", devices=chips)
    assert mesh.shape["fsdp"] == len(chips) // 8
    assert set(mesh.devices.flat) == set(chips)
