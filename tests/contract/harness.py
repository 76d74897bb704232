"""Table of all rows, and shared tools: inputs by dtype, compiled runs, comparison of errors."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.contract.cases import OPS, Case
from tests.contract.layer_cases import LAYERS

ROWS = OPS + LAYERS
# The hardest row of every op and of every kind of layer: tests of wrappers run these rows with
# every algorithm, and tests of sharding with both kinds of mesh axes.
THOROUGH = {
    "linear_scan",
    "linear_scan-complex",
    "log_scan",
    "step_scan",
    "block_scan",
    "ssm_scan",
    "selective_scan",
    "linear_attention-channel",
    "delta_rule-channel",
    "generalized_delta_rule",
    "monoid_scan-softmax",
    "nonlinear_scan-block",
    "LRU",
    "S5-bidirectional",
    "Mamba",
    "DeltaNet-gated",
    "RWKV7",
    "MLSTM",
    "ParaLSTM",
}
# Rows of the quick tests: those that compile fast and share code with many others.
QUICK = {
    "linear_scan",
    "linear_scan-complex",
    "log_scan",
    "step_scan",
    "block_scan",
    "selective_scan",
    "delta_rule-channel",
    "monoid_scan-softmax",
    "nonlinear_scan-block",
    "LRU",
    "Mamba",
}
# Layers with their own loops over time, whose derivatives do not follow from those of the ops.
OWN_LOOPS = {"BlockRecurrent"}
# Rows of layers that differ from another row of their layer only inside a step: in an activation, a
# norm over features, a constant, or the size of the numbers. They run in the tests of values, of
# state and of first derivatives. The axes and the ops that a wrapper sees are those of the other
# row.
OPTIONS = {
    *("LRU-best", "S5-softplus", "S4D-legs", "S4D-real", "S4D-best", "LinOSS-imex"),
    *("Mamba-negative", "Mamba-falcon", "Mamba2-limited", "Mamba2-norm-first"),
    *("MLSTM-large_gates", "MLSTM-7b", "MLSTM-7b_eps", "MLSTM-sig", "MLSTM-sig_normalized"),
    *("Aaren-large_scores", "LightNet-large_keys", "RetNet-narrow_keys", "Based-rebased"),
    *("LinearAttention-performer", "LinearAttention-rms", "DeltaNet-dpfp", "KDA-bounded"),
    *("LightningAttention-linear", "LightningAttention-minimax", "SRWM-input_softmax"),
    *("RWKV4-present", "RWKV4-large_keys", "RWKV6-5_present", "RWKVChannelMix-4_present"),
    *("RGLRU-unit-first-step", "MinGRU-signed", "MinLSTM-signed", "IndRNN-tanh", "MLA-unrotated"),
    *("LSTM-cifg", "LSTM-fgr", "LSTM-norm", "RMSNorm-offset", "GatedMLP-gelu", "MLP-gelu"),
    *("GatedConv-bias", "MoE-sigmoid"),
}
NAMES = {case.name for case in ROWS}
assert NAMES > THOROUGH | OWN_LOOPS | OPTIONS
assert THOROUGH > QUICK
# Every row with each of its algorithms; "pallas" is the interpreted kernel.
VARIANTS = [(case, algorithm) for case in ROWS for algorithm in case.algorithms]
B, T = 2, 13


def row_of(test: str) -> str:
    """Return the row in the name of a test, or the name itself if it has none.

    The tests of a row run one after another in one process: they share compiled functions and the
    oracle's results.
    """
    words = test.partition("[")[2].rstrip("]").split("-")
    for size in range(len(words), 0, -1):
        for start in range(len(words) - size + 1):
            if (name := "-".join(words[start : start + size])) in NAMES:
                return name
    return test


def by_variant(
    keep: Any = lambda case: True,
    every_kernel: bool = True,
    variant: Any = lambda case, algorithm: True,
    quick: Any = QUICK,
) -> Any:
    """Parametrize by (case, algorithm); the first algorithm of rows in `quick` is not slow."""
    return pytest.mark.parametrize(
        ("case", "algorithm"),
        [
            pytest.param(
                case,
                algorithm,
                id=f"{case}-{algorithm}" if algorithm else str(case),
                marks=[pytest.mark.slow]
                * (case.name not in quick or algorithm != case.algorithms[0]),
            )
            for case, algorithm in VARIANTS
            if keep(case)
            and variant(case, algorithm)
            and (every_kernel or with_kernel_once(case, algorithm))
        ],
    )


def with_kernel_once(case: Case, algorithm: str | None) -> bool:
    """Return False for all kernels except the first, if the property comes from the XLA form."""
    return algorithm != "pallas" or case.name == "linear_scan"


def by_row(keep: Any = lambda case: True) -> Any:
    """Parametrize a test by row; the quick rows are not slow."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=str(case),
                marks=[pytest.mark.slow] * (case.name not in QUICK),
            )
            for case in ROWS
            if keep(case)
        ],
    )


def rows_with_meshes(quick: Any, kind: AxisType) -> Any:
    """Parametrize by row and kind of mesh axes; rows in `quick` on Explicit axes are not slow.

    One or two rows of each op, and one layer of each kind, run on both kinds of mesh. The other
    rows run on `kind`, because all rows of an op share the code that depends on the kind.
    """
    return pytest.mark.parametrize(
        ("case", "kind"),
        [
            pytest.param(
                case,
                axis_type,
                id=f"{case}-{axis_type.name}",
                marks=[pytest.mark.slow] * (case.name not in quick or axis_type == AxisType.Auto),
            )
            for case in ROWS
            for axis_type in (AxisType.Auto, AxisType.Explicit)
            if case.name not in OPTIONS
            and (case.name in THOROUGH or case.name in quick or axis_type == kind)
        ],
    )


def wrapped(case: Case, algorithm: str | None) -> bool:
    """Return True if a test of a wrapper (vmap, sharding, `lax.scan`) runs the variant.

    A wrapper depends on the arguments of an op and on the code of its algorithms. Every row runs
    but `OPTIONS` with its first algorithm, and the thorough rows, one or two of each op, with all
    algorithms.
    """
    return case.name in THOROUGH or (case.name not in OPTIONS and algorithm == case.algorithms[0])


def one_layer_of_each_kind(case: Case) -> bool:
    """Return True for every op, one layer of each kind, and layers with their own loops."""
    return case.layer is None or case.name in THOROUGH | OWN_LOOPS


def make(case: Case, batch: int = B, length: int = T, seed: int = 0) -> tuple[Any, Any, np.ndarray]:
    """Draw float64 (inputs, initial state, reset); about one step in five resets."""
    rng = np.random.default_rng([seed, length])
    inputs = case.inputs(rng, batch, length)
    state = None if case.state is None else case.state(rng, batch)
    return inputs, state, rng.random((batch, length)) < 0.2


def cast(tree: Any, dtype: str) -> Any:
    """Cast a tree to a dtype, and complex leaves to the complex dtype of that width."""
    wide = np.complex128 if dtype == "float64" else np.complex64

    def leaf(value: np.ndarray) -> jax.Array:
        # NumPy converts: an eager conversion of a JAX array compiles a program for each shape.
        return jnp.asarray(np.asarray(value).astype(wide if np.iscomplexobj(value) else dtype))

    return jax.tree.map(leaf, tree)


def cast_inputs(case: Case, inputs: Any, dtype: str) -> Any:
    """Cast as `cast` does, but keep a layer's parameters in float32 for narrower inputs."""
    if case.layer is None or dtype != "bfloat16":
        return cast(inputs, dtype)
    return {k: cast(v, "float32" if k == "params" else dtype) for k, v in inputs.items()}


def keywords(algorithm: str | None, chunk_size: int = 4) -> dict[str, Any]:
    if algorithm is None:
        return {}
    if algorithm == "pallas":
        return {"implementation": "pallas", "interpret": True}
    chunk = {} if algorithm in ("sequential", "newton") else {"chunk_size": chunk_size}
    return {"algorithm": algorithm, **chunk}


@contextlib.contextmanager
def unoptimized() -> Any:
    """Compile without expensive optimizations, for results that do not depend on them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def runner(case: Case, algorithm: str | None, chunk_size: int = 4) -> Any:
    """Return the compiled (inputs, state, reset) -> (outputs, final state)."""
    return jax.jit(functools.partial(case.run, **keywords(algorithm, chunk_size)))


def pair(x: Any, weight: Any) -> Any:
    """Return sum Re(x * weight); outside jit in NumPy, which compiles nothing."""
    if isinstance(x, jax.core.Tracer) or isinstance(weight, jax.core.Tracer):
        return jnp.sum(jnp.real(x * weight))
    return np.sum(np.real(np.asarray(x) * np.asarray(weight)))


def weights(tree: Any, seed: int = 7) -> Any:
    """Return a fixed random weight for every element of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            rng.standard_normal(x.shape)
            + (1j * rng.standard_normal(x.shape) if np.iscomplexobj(x) else 0)
        ),
        tree,
    )


def state_weights(case: Case, final: Any) -> Any:
    """Return weights for the final state; layers' states are tested by continuing from them."""
    return None if case.layer is not None else weights(final, 8)


def contract(tree: Any, w: Any) -> Any:
    """Return sum Re(tree * w), a scalar that depends on every element of the tree."""
    return sum(jax.tree.leaves(jax.tree.map(pair, tree, w)))


@functools.cache
def runner_with_gradients(case: Case, algorithm: str | None) -> Any:
    """Return the compiled (inputs, state, reset, output weights, state weights) -> gradients."""
    run = functools.partial(case.run, **keywords(algorithm))

    def loss(inputs: Any, state: Any, reset: Any, w_out: Any, w_state: Any) -> jax.Array:
        out, final = run(inputs, state, reset)
        # Selected, not multiplied: outputs without weight may be NaN.
        out = jax.tree.map(lambda y, w: jnp.where(w == 0, jnp.zeros_like(y), y), out, w_out)
        total = contract(out, w_out)
        return total if w_state is None else total + contract(final, w_state)

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))


def error(actual: Any, expected: Any) -> tuple[float, str]:
    """Return the largest error of any element relative to its array's largest magnitude, and where.

    A NaN error counts as infinite, so that no later leaf can hide it.
    """
    worst, place = 0.0, ""
    actual_leaves = jax.tree_util.tree_leaves_with_path(actual)
    expected_leaves = jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), "the trees differ"
    for (path, a), e in zip(actual_leaves, expected_leaves, strict=True):
        wide = np.complex128 if np.iscomplexobj(e) else np.float64
        a, e = np.asarray(a).astype(wide), np.asarray(e).astype(wide)
        assert a.shape == e.shape, f"{jax.tree_util.keystr(path)}: {a.shape} != {e.shape}"
        scale = max(float(np.abs(e).max(initial=0)), 1e-30)
        with np.errstate(invalid="ignore"):  # inf - inf
            errors = np.abs(a - e) / scale
        errors = np.where(np.isnan(errors), np.inf, errors)
        index = np.unravel_index(np.argmax(errors), e.shape)
        largest = float(errors[index])
        if largest > worst:
            worst = largest
            place = (
                f"{jax.tree_util.keystr(path)}{list(map(int, index))}: {a[index]} for {e[index]}"
            )
    return worst, place


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    worst, place = error(actual, expected)
    assert worst <= tolerance, f"error {worst:.2e} > {tolerance:.0e} of the scale at {place}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def cut(case: Case, inputs: Any, start: int, stop: int) -> Any:
    """Return steps start..stop of the inputs."""
    return {k: case.in_time(k, v, slice(start, stop)) for k, v in inputs.items()}


def copied(case: Case, inputs: Any) -> Any:
    """Return the inputs, with copies of those that vary in time."""
    names = case.timed + case.shared
    return {k: v.copy() if k in names else v for k, v in inputs.items()}
