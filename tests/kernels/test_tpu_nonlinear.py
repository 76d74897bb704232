"""TPU kernel of nonlinear cells, interpreted: values and gradients against the sequential form.

`test_aot` compiles it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from pallas_kernels.nonlinear_scan import tpu, tpu_blocks
from seqjax.cells import GRU, LSTM, MGU, DenseSLSTM, Elman, Headwise, ParaLSTM
from tests.contract.harness import assert_close
from tests.kernels.nonlinear import (
    INTERPRETED,
    SEQUENTIAL,
    arrays,
    narrow,
    pulled,
    several_pulled,
)


def compared(cell, batch, length, dtype="float32", tolerance=2e-6):
    given = arrays(cell, batch, length, dtype)
    found = pulled(cell, *given, interpret=True)
    assert_close(found, pulled(cell, *given, algorithm="sequential"), tolerance)


def test_a_cell_with_a_matrix(compiled_quickly):
    compared(Elman(3), 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        GRU(4),
        LSTM(4),
        LSTM(4, variant="fgr", peepholes=True),
        DenseSLSTM(4),
        MGU(4),  # its second product is not of the state
        Headwise(Elman(2), 3),
        Headwise(GRU(4), 2),
        Headwise(LSTM(4), 2),
        Headwise(DenseSLSTM(4), 2),
    ],
    ids=repr,
)
def test_cells(cell, compiled_quickly):
    """Compare over two blocks of time, of which the last is ragged."""
    compared(cell, 3, 70)


@pytest.mark.slow
def test_narrow_inputs(compiled_quickly):
    """Check that only what is bfloat16, states and cotangents of inputs, has its tolerance."""
    given = arrays(GRU(4), 2, 5, "bfloat16")
    (hs, final), (d_params, d_xs, d_state) = pulled(GRU(4), *given, interpret=True)
    out, cts = pulled(GRU(4), *given, algorithm="sequential")
    assert_close((hs, d_xs), (out[0], cts[1]), 8e-3)
    assert_close((final, d_params, d_state), (out[1], cts[0], cts[2]), 2e-6)


def by_kernel(cell, params, xs, state, reset, cts):
    """Return states and gradients by the kernel itself."""
    forward = functools.partial(tpu.scan, cell, out_dtype=xs.dtype, save_states=True)
    *out, kept = jax.jit(functools.partial(forward, interpret=True))(params, xs, state, reset)
    backward = jax.jit(functools.partial(tpu.adjoint, cell, interpret=True))
    d_params, [d_xs], d_state = backward(params, xs, state, reset, kept, *cts)
    return out, (jax.tree.unflatten(jax.tree.structure(params), d_params), d_xs, d_state)


@pytest.mark.slow
def test_elementwise_cells(compiled_quickly):
    given = arrays(ParaLSTM(4), 3, 5)
    assert_close(
        by_kernel(ParaLSTM(4), *given), pulled(ParaLSTM(4), *given, algorithm="sequential"), 2e-6
    )


@pytest.mark.slow
def test_several_blocks_of_sequences(monkeypatch, compiled_quickly):
    """Use two blocks of 16 sequences for 19: the padded ones add nothing to gradients."""
    monkeypatch.setattr(tpu_blocks, "MAX_SEQUENCES", 16)
    given = arrays(GRU(3), 19, 3)
    assert_close(by_kernel(GRU(3), *given), pulled(GRU(3), *given, algorithm="sequential"), 2e-6)


@pytest.mark.slow
def test_nothing_crosses_a_reset(compiled_quickly):
    params, xs, state, reset, cts = arrays(GRU(4), 1, 12)
    reset = jnp.zeros_like(reset).at[0, 7].set(True)
    xs, state = xs.at[0, 5].set(jnp.nan), jnp.full_like(state, jnp.nan)
    (hs, final), (_, d_xs, _) = by_kernel(GRU(4), params, xs, state, reset, cts)
    assert np.isnan(hs[0, :7]).all()
    after = params, xs[:, 7:], jnp.zeros_like(state), None, (cts[0][:, 7:], cts[1])
    out, (_, expected, _) = pulled(GRU(4), *after, algorithm="sequential")
    assert_close((hs[:, 7:], final), out, 2e-6)
    assert_close(d_xs[:, 7:], expected, 2e-6)


@pytest.mark.slow
def test_a_cell_of_the_user(compiled_quickly):
    found, expected = (several_pulled(4, **way) for way in (INTERPRETED, SEQUENTIAL))
    assert_close(found, expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "shape", "tolerance"),
    [
        # The second parameter is [2, D], and no matrix of a product.
        (lambda p, h, x: jnp.tanh(h @ p[0] + x) * jax.nn.softplus(p[1])[0], (4,), 2e-6),
        (lambda p, h, x: jnp.tanh((h[:, 0] @ p[0] + x)[:, None]), (4, 1), 2e-6),
        # Products and their cotangents have 8 bits, and the sum over steps has another order.
        (
            lambda p, h, x: jnp.tanh(jnp.dot(h, p[0], preferred_element_type=jnp.bfloat16) + x),
            (4,),
            2e-2,
        ),
    ],
    ids=["vectors", "one number per channel", "bfloat16 products"],
)
def test_other_arrays(cell, shape, tolerance, compiled_quickly):
    rng = np.random.default_rng(0)
    sizes = ((4, 4), (2, 4)), (2, 3, 4), (2, *shape)
    args = jax.tree.map(
        lambda size: narrow(0.4 * rng.standard_normal(size)),
        sizes,
        is_leaf=lambda size: isinstance(size[0], int),
    )

    def gradients(**keywords):
        def loss(*args):
            hs, final, _ = seqjax.nonlinear_scan(cell, *args, **keywords)
            return jnp.sum(jnp.sin(hs)) + jnp.sum(final**2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)

    assert_close(gradients(interpret=True), gradients(algorithm="sequential"), tolerance)


def lowered(function, *args):
    """Return the program lowered for TPU, without a TPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
def test_it_has_to_be_named():
    layer = seqjax.layers.GRU(128)
    named = seqjax.layers.GRU(128, implementation="pallas")
    params, x = layer.init(jax.random.key(0)), jnp.ones((8, 16, 128))
    kernel = "@tpu_custom_call"
    assert kernel not in lowered(layer.apply, params, x)
    assert lowered(named.apply, params, x).count(kernel) == 1

    def loss(params, x):
        return jnp.sum(named.apply(params, x)[0])

    assert lowered(jax.grad(loss), params, x).count(kernel) == 2
    mapped = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    assert lowered(mapped, params, jnp.stack([x, x])).count(kernel) == 2


@jax.custom_jvp
def custom(h, W):
    return h @ W


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0] @ primals[1]))


def tanh(params, h, x):
    return jnp.tanh(h + x)


@pytest.mark.slow
def test_what_it_cannot_do():
    def refused(cell, message, params=None, channels=8):
        params = jnp.ones((channels, channels)) if params is None else params
        xs, state = jnp.ones((1, 3, channels)), jnp.ones((1, channels))
        run = functools.partial(seqjax.nonlinear_scan, cell, implementation="pallas")
        with pytest.raises(NotImplementedError, match=f"^nonlinear_scan: .*{message}"):
            lowered(run, params, xs, state)

    refused(lambda W, h, x: jnp.tanh(h @ W.T + x), "got a product with another factor than")
    refused(lambda W, h, x: jnp.tanh(h @ W + W[0] + x), "got 'slice' of a matrix")
    refused(lambda W, h, x: h @ W + custom(h, W) + x, "got a matrix in a function with a custom")
    refused(lambda W, h, x: jnp.tanh(h @ W) * jnp.sum(h), "got 'reduce_sum' over channels")
    refused(
        lambda p, h, x: h @ p[0] @ p[1] + x, "a matrix .D, D.", [jnp.ones((8, 2)), jnp.ones((2, 8))]
    )
    refused(lambda W, h, x: jnp.tanh(h @ W + x), "at most 16 MiB .* got 17.0 MiB", channels=2049)
    large = np.ones((2049, 2049), "float32")
    refused(lambda p, h, x: h * p + x @ large, "at most 16 MiB", jnp.ones(2049), 2049)
    sizes = jax.export.symbolic_shape("b, 3, 8")
    with pytest.raises(NotImplementedError, match="got the symbolic size b"):
        jax.export.export(
            jax.jit(lambda x, h: seqjax.nonlinear_scan(tanh, (), x, h, implementation="pallas"))
        )(jax.ShapeDtypeStruct(sizes, "float32"), jax.ShapeDtypeStruct((sizes[0], 8), "float32"))
    with pytest.raises(NotImplementedError, match="a step of the cell must fit"):
        tpu_blocks.choose_blocks(3, 8, 2048, 300, reverse=True, interpret=True)
