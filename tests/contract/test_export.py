"""Contract: `jax.export` with symbolic sizes, for platforms other than the host's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import seqjax
from tests.contract.harness import (
    OPTIONS,
    ROWS,
    THOROUGH,
    assert_close,
    cast,
    keywords,
    make,
    one_layer_of_each_kind,
)

PLATFORMS = ("cpu", "tpu", "cuda")
ANY_LENGTH = (None, "sequential")  # the algorithms that run with a symbolic T
QUICK = {"linear_scan", "delta_rule", "GRU"}  # one of each kind
CHUNKED = {
    "linear_attention",
    "delta_rule",
    "generalized_delta_rule",
    "momentum_delta_rule",
}  # and their chunks
VARIANTS = [
    pytest.param(
        case,
        algorithm,
        id=f"{case}-{algorithm}",
        marks=[pytest.mark.slow] * (case.name not in QUICK or algorithm is not None),
    )
    for case in ROWS
    if case.name not in OPTIONS
    for algorithm in dict.fromkeys((None, *case.algorithms))
    if algorithm != "pallas"
]


def takes_any_length(case, algorithm):
    chunks = algorithm == "chunked" and case.name.split("-")[0] in CHUNKED
    return algorithm in ANY_LENGTH or chunks


# A named algorithm that runs with a symbolic B and T runs with a symbolic B. The defaults do not
# follow from that: they depend on whether T is known. Those of a layer are those of its ops, so
# that one layer of each kind is enough. The rows of an op share the code of its gradients, so the
# first row of each op and the thorough rows are enough.
BATCH_ONLY = [
    v
    for v in VARIANTS
    if (v.values[1] is None and one_layer_of_each_kind(v.values[0]))
    or not takes_any_length(*v.values)
]
DIFFERENTIATED = [
    pytest.param(case, id=str(case))
    for case in ROWS
    if case.name in THOROUGH or (case.layer is None and "-" not in case.name)
]


def arguments(case, batch, length):
    inputs, state, reset = make(case, batch, length)
    return cast(inputs, "float32"), cast(state, "float32"), jnp.asarray(reset)


def shapes(case, batch, length):
    """Return symbolic shapes of the arguments, inferred from the shapes of two calls."""

    def leaf(one, other):
        sizes = {(5, 6): batch, (11, 12): length}
        axes = zip(one.shape, other.shape, strict=True)
        return jax.ShapeDtypeStruct([sizes.get(pair, pair[0]) for pair in axes], one.dtype)

    return jax.tree.map(leaf, arguments(case, 5, 11), arguments(case, 6, 12))


def exported(run, args):
    return export.export(jax.jit(run), platforms=PLATFORMS)(*args)


def check_values(program, case, length):
    """Call an exported program and compare its results with the oracle's."""
    result = program.call(*arguments(case, 2, length))
    expected = case.oracle(*make(case, 2, length))
    if expected[1] is None:  # final states of layers are compared by continuing from them
        result, expected = result[0], expected[0]
    assert_close(result, expected, case.tolerance["float32"])


@pytest.mark.parametrize(("case", "algorithm"), BATCH_ONLY)
def test_symbolic_batch(case, algorithm, compiled_quickly):
    (batch,) = export.symbolic_shape("b")
    program = exported(functools.partial(case.run, **keywords(algorithm)), shapes(case, batch, 13))
    check_values(program, case, 13)


@pytest.mark.parametrize(("case", "algorithm"), VARIANTS)
def test_symbolic_batch_and_length(case, algorithm, compiled_quickly):
    run, args = (
        functools.partial(case.run, **keywords(algorithm)),
        shapes(case, *export.symbolic_shape("b, t")),
    )
    if not takes_any_length(case, algorithm):
        name = case.name.split("-")[0]
        with pytest.raises(
            NotImplementedError,
            match=rf"^{name}: the '{algorithm}' algorithm must have a T that is known at trace"
            r" time, got the symbolic T=t; use algorithm='sequential' or None",
        ):
            exported(run, args)
        return
    program = exported(run, args)
    if not one_layer_of_each_kind(case):
        return  # the values of a layer with symbolic sizes are those of its ops
    for length in (1, 13) if case.name in QUICK else (13,):
        check_values(program, case, length)


@functools.cache
def gradient(case):
    """Return the compiled gradient to compare the exported programs of both lengths with."""

    def loss(inputs, state, reset):
        out, _ = case.run(inputs, state, reset)
        return sum(jnp.sum(jnp.abs(y) ** 2) for y in jax.tree.leaves(out))

    return jax.jit(jax.grad(loss))


@pytest.mark.slow
@pytest.mark.parametrize("length", [13, "t"])
@pytest.mark.parametrize("case", DIFFERENTIATED)
def test_symbolic_gradients(case, length, compiled_quickly):
    batch, symbol = export.symbolic_shape("b, t")
    sizes = shapes(case, batch, symbol if length == "t" else length)
    program = exported(gradient(case), sizes)
    args = arguments(case, 2, 13)
    assert_close(program.call(*args), gradient(case)(*args), case.tolerance["float32"])


def classifier(layer):
    return seqjax.models.Classifier(3, seqjax.models.Backbone(layer), vocab_size=7)


def language_model(**keywords):
    layers = seqjax.layers.LRU(4), seqjax.layers.SlidingWindowAttention(4, heads=2, window=3)
    return seqjax.models.LanguageModel(7, seqjax.models.Backbone(layers, mlp_ratio=0, **keywords))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(language_model(), id="language_model"),
        pytest.param(
            language_model(depth=4, scan=True), id="scanned_blocks", marks=pytest.mark.slow
        ),
        pytest.param(
            classifier(seqjax.layers.S5(4, bidirectional=True)),
            id="bidirectional_classifier",
            marks=pytest.mark.slow,
        ),
        pytest.param(classifier(seqjax.layers.LRU(4)), id="classifier", marks=pytest.mark.slow),
    ],
)
def test_models_with_symbolic_sizes(model, compiled_quickly):
    rng = np.random.default_rng(0)
    params = model.init(jax.random.key(0))
    tokens, reset = jnp.asarray(rng.integers(0, 7, (2, 5))), jnp.asarray(rng.random((2, 5)) < 0.2)

    def run(params, tokens, reset):
        return model.apply(params, tokens, reset=reset)

    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    sizes = export.symbolic_shape("b, t")
    program = exported(
        run, (like, *(jax.ShapeDtypeStruct(sizes, x.dtype) for x in (tokens, reset)))
    )
    wanted = jax.jit(run)(params, tokens, reset)
    assert_close(program.call(params, tokens, reset), wanted, 1e-5)


def test_kernels_are_exported_for_tpu():
    """Check that exports use the default of the target platform, not of the host."""
    (batch,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 64, 128), jnp.float32)
    decay = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    assert "tpu_custom_call" in exported(seqjax.linear_scan, (decay, x)).mlir_module()


def test_kernels_refuse_symbolic_sizes_they_do_not_support():
    batch, length = export.symbolic_shape("b, t")
    run = functools.partial(seqjax.linear_scan, implementation="pallas")
    for shape, platform in (((batch, 64, 128), "cuda"), ((2, length, 128), "tpu")):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        with pytest.raises(
            NotImplementedError, match=r"^linear_scan: the Pallas kernel .*must have .*symbolic"
        ):
            export.export(jax.jit(run), platforms=(platform,))(x, x)
