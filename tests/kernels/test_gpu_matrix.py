"""Interpreted GPU kernels of the matrix-state ops, and their limits.

The interpreter runs the tensor cores' products, except those with a left factor in registers, for
which it computes ordinary products. `test_gpu_matrix_chunks` checks every form of a chunk at a
fraction of the cost, and `test_aot_gpu` compiles the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from pallas_kernels.gpu import matrix_state
from tests.contract.harness import assert_close
from tests.kernels.gpu import KERNEL, TOLERANCE, interpreted
from tests.oracles import op_oracles

WIDE = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def arrays(op, decay, dtype, sizes, groups=None, seed=0):
    """Draw the inputs of an op by name, the initial state, and resets inside chunks."""
    rng = np.random.default_rng(seed)
    B, T, H, K, V = sizes
    G = groups or H

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    given = {"q": draw(B, T, G, K), "k": draw(B, T, G, K) / K**0.5, "v": draw(B, T, H, V)}
    if op == "delta_rule":
        given["beta"] = jnp.asarray(rng.uniform(0, 2, (B, T, H)), jnp.float32)
    if op == "generalized_delta_rule":
        given |= {"a": -draw(B, T, H, K) / K**0.5, "b": draw(B, T, H, K) / K**0.5}
    if decay:
        shape = {"head": (B, T, H), "channel": (B, T, H, K)}[decay]
        given["log_decay"] = jnp.asarray(-rng.uniform(0, 0.5, shape), jnp.float32)
    state, reset = draw(B, H, K, V, dtype="float32"), rng.random((B, T)) < 0.05
    if "a" in given:
        given["a"] = cleared(given["a"], reset)
    return given, state, reset


def cleared(a, reset):
    """Return `a` as the kernels get it, zero where the state that it reads is cleared."""
    return jnp.where(reset[..., None, None], 0, a)


def exactly(tree):
    """Return the arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), WIDE(tree))


def call(function, op, given, *rest, **keywords):
    """Call a function of the kernels."""
    names = ("q", "k", "v", "beta", "log_decay")
    scale = given["q"].shape[-1] ** -0.5
    inputs = [given.get(name) for name in names]
    vectors = {name: given[name] for name in "ab" if name in given}
    return function(op, *inputs, *rest, scale=scale, vectors=vectors, interpret=True, **keywords)


FORMS = [
    pytest.param("linear_attention", "head", "bfloat16", id="linear attention"),
    pytest.param("delta_rule", "head", "float32", id="delta rule"),
    pytest.param("delta_rule", None, "bfloat16", id="no decay"),
    pytest.param("linear_attention", "channel", "float32", id="linear attention, channels"),
    pytest.param("delta_rule", "channel", "bfloat16", id="delta rule, channels"),
    pytest.param("generalized_delta_rule", "channel", "bfloat16", id="generalized delta rule"),
]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("op", "decay", "dtype"), FORMS)
def test_values(op, decay, dtype):
    """Check two heads that share keys, two chunks, and steps that are no whole tile."""
    groups = 2 if op == "generalized_delta_rule" else 1
    given, state, reset = arrays(op, decay, dtype, (1, 74, 2, 64, 64), groups)
    reset = reset if decay else np.zeros_like(reset)
    found = call(matrix_state.forward, op, given, state, jnp.asarray(reset) if decay else None)
    oracle = getattr(op_oracles, op)(exactly(given), exactly(state), reset)
    assert_close(exactly(found), oracle, TOLERANCE[dtype])


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("op", "decay", "dtype"), FORMS)
def test_gradients(op, decay, dtype):
    """Check the cotangents against those of the sequential form in float64."""
    sizes = (1, 74, 1, 64, 128)
    if (op, decay) == ("delta_rule", "channel"):  # two sequences, and two tiles of channels
        sizes = (2, 74, 1, 128, 64)
    given, state, reset = arrays(op, decay, dtype, sizes)
    reset = jnp.asarray(reset) if decay else None
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(given["v"].shape), dtype)
    d_final = jnp.asarray(rng.standard_normal(state.shape), jnp.float32)
    found = call(matrix_state.backward, op, given, state, reset, d_out, d_final)
    exact = exactly((given | {"initial_state": state}, (d_out, d_final)))
    with jax.enable_x64(True):
        sequential = functools.partial(getattr(seqjax, op), reset=reset, algorithm="sequential")
        wide, cotangents = jax.tree.map(jnp.asarray, exact)
        [expected] = jax.jit(lambda x, ct: jax.vjp(lambda x: sequential(**x), x)[1](ct))(
            wide, cotangents
        )
        expected = jax.tree.map(np.asarray, expected)
    if "a" in found:
        found["a"] = cleared(found["a"], reset)
    assert_close(exactly({name: found[name] for name in expected}), expected, TOLERANCE[dtype])


@interpreted
@pytest.mark.slow
def test_keys_that_repeat_and_states_that_are_not_finite():
    """Check the inverse where powers of N are huge, and that a NaN does not cross a reset."""
    given, state, reset = arrays("delta_rule", None, "float32", (1, 64, 1, 64, 64))
    given["k"] = jnp.full_like(given["k"], 1 / 8)
    given["beta"] = jnp.ones_like(given["beta"])
    reset[:], reset[0, 0] = False, True
    state = jnp.full_like(state, jnp.nan)
    found = call(matrix_state.forward, "delta_rule", given, state, jnp.asarray(reset))
    oracle = op_oracles.delta_rule(exactly(given), np.zeros(state.shape), reset)
    assert_close(exactly(found), oracle, TOLERANCE["float32"])


def lowered(
    op, shape, decay_axes=3, implementation="pallas", dtype="bfloat16", gradients=False, **keywords
):
    """Return the program lowered for GPU, without a GPU."""
    spec = jax.ShapeDtypeStruct
    row = spec(shape, jnp.dtype(dtype))
    given = {"q": row, "k": row, "v": row}
    if decay_axes:
        given["log_decay"] = spec(shape[:decay_axes], jnp.float32)
    if op == "delta_rule":
        given["beta"] = spec(shape[:3], jnp.float32)
    if op == "generalized_delta_rule":
        given |= {"a": row, "b": row}

    def run(given):
        return getattr(seqjax, op)(**given, implementation=implementation, **keywords)

    def both(given):
        out, pull = jax.vjp(run, given)
        return out, pull(out)

    return (
        jax.jit(both if gradients else run)
        .trace(given)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


@pytest.mark.parametrize(
    ("shape", "keywords", "message"),
    [
        ((1, 64, 1, 32), {}, "must have keys of 64 or 128 numbers .* got 32 and 32"),
        (
            (1, 64, 1, 128),
            {"decay_axes": 4, "dtype": "float32"},
            "channel in float32.*64 numbers, got 128; use bfloat16",
        ),
        ((1, 64, 1, 64), {"chunk_size": 128}, "must have chunks of 64 steps.*128"),
        ((1, 64, 1, 64), {"block_sizes": (64, 1)}, "must be None on GPU.*got .*; leave it out"),
    ],
    ids=["width", "decays per channel", "chunk size", "block sizes"],
)
def test_what_the_kernels_cannot_do(shape, keywords, message):
    with pytest.raises(NotImplementedError, match=f"^delta_rule: .*{message}"):
        lowered("delta_rule", shape, **keywords)


def test_kernels_run_by_name_only():
    shape = (1, 128, 2, 64)
    assert lowered("linear_attention", shape).count(KERNEL) == 2
    assert KERNEL not in lowered("linear_attention", shape, implementation=None)


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "generalized_delta_rule"])
@pytest.mark.parametrize("decay_axes", [0, 3, 4], ids=["no decay", "head", "channel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_lower(op, decay_axes, dtype):
    """Check that blocks fit the shared memory: pairs, outputs, and four kernels of gradients."""
    if op == "generalized_delta_rule" and dtype == "float32":
        with pytest.raises(NotImplementedError, match="must have bfloat16 inputs"):
            lowered(op, (1, 128, 2, 64), decay_axes, dtype=dtype)
        return
    keys = 64 if (op, decay_axes, dtype) == ("delta_rule", 4, "float32") else 128
    program = lowered(op, (1, 128, 2, keys), decay_axes, dtype=dtype, gradients=True)
    assert program.count(KERNEL) == 6
