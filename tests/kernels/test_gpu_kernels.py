"""Interpreted GPU kernels against float64 loops, and the selection of kernels.

The contract tests run the TPU's kernels, which is what `interpret=True` means. Needs a jax whose
Pallas interprets Mosaic GPU, 0.11.2 or newer, and finds races; what needs none is at the end.
`test_aot_gpu` compiles them, `test_gpu_defaults` tests when they are the default.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from pallas_kernels.linear_scan import gpu, time_segments
from tests.contract.harness import assert_close
from tests.kernels.gpu import KERNEL, TOLERANCE, interpreted, narrowed, parts, whole
from tests.oracles import op_oracles


def arrays(shape, axes, complex_=False, seed=0):
    """Draw decays over the named axes, x, a state, resets, and cotangents of outputs and state."""
    rng = np.random.default_rng(seed)
    B, T, D = shape

    def normal(*shape):
        real = rng.standard_normal(shape)
        return real + 1j * rng.standard_normal(shape) if complex_ else real

    sizes = [n if axis in axes else 1 for n, axis in zip(shape, "BTD", strict=True)]
    decay = rng.uniform(0.5, 1.0, sizes)
    if complex_:
        decay = decay * np.exp(1j * rng.uniform(0, 3, decay.shape))
    reset = rng.random((B, T)) < 0.2
    return decay, normal(B, T, D), normal(B, D), reset, normal(B, T, D), normal(B, D)


def post_form(a, x, h, reset, reverse):
    """Compute y_t = c + x_t; c <- a_t y_t."""
    a, y, h = np.broadcast_to(a, x.shape), np.zeros_like(x), h.copy()
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        y[:, t] = h + x[:, t]
        h = np.where(reset[:, t, None], 0, a[:, t] * y[:, t])
    return y, h


def adjoint(a, y, h, reset, dy, d_final, reverse):
    """Compute the cotangents of a, x and h from outputs y, in a loop backward in time."""
    dx, dh = post_form(a, dy, d_final, reset, not reverse)
    found = (np.append(y[:, 1:], h[:, None], 1) if reverse
             else np.append(h[:, None], y[:, :-1], 1))  # fmt: skip
    da = np.where(reset[..., None], 0, dx * found)
    axes = tuple(i for i in range(3) if a.shape[i] == 1)
    return np.sum(da, axis=axes, keepdims=True), dx, dh


FORMS = [
    pytest.param("BTD", False, "float32", id="float32"),
    pytest.param("BTD", False, "bfloat16", id="bfloat16"),
    pytest.param("BTD", True, "float32", id="complex"),
    pytest.param("TD", False, "float32", id="shared over batch"),
    pytest.param("D", False, "float32", id="constant"),
]


@interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("axes", "complex_", "dtype"), FORMS)
def test_values(axes, complex_, dtype, reverse):
    # More blocks of time than the prefetch depth; ragged edges in time and features.
    given = arrays((2, 27, 136), axes, complex_)
    decay, x, dy = narrowed([given[0], given[1], given[4]], dtype)
    h0, d_final = narrowed([given[2], given[5]], "float32")
    reset = given[3]
    run = {"reverse": reverse, "out_dtype": dtype, "block_sizes": (4, 128), "interpret": True}
    y, final = gpu.scan(
        parts(decay, dtype), parts(x, dtype), parts(h0, "float32"), reset, post=False, **run
    )
    assert {part.dtype for part in y} == {jnp.dtype(dtype)}
    inputs = {"decay": decay[tuple(0 if n == 1 else slice(None) for n in decay.shape[:2])], "x": x}
    expected = op_oracles.linear_scan(inputs, h0, reset, reverse)
    assert_close((whole(y), whole(final)), expected, TOLERANCE[dtype])
    kept = whole(parts(expected[0], dtype))
    found = gpu.adjoint(
        parts(decay, dtype), parts(kept, dtype), parts(h0, "float32"), reset, parts(dy, dtype),
        parts(d_final, "float32"), **run,
    )  # fmt: skip
    cotangents = adjoint(decay, kept, h0, reset, dy, d_final, reverse)
    assert_close(tuple(map(whole, found)), cotangents, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("shape", [(1, 16, 128), (2, 21, 128), (1, 3, 8)], ids=str)
def test_other_shapes_without_reset(shape):
    """Check block sizes that the kernel chooses, and the `post` form."""
    decay, x, h0, reset, *_ = arrays(shape, "BTD", seed=1)
    given = [parts(array, "float32") for array in (decay, x, h0)]
    run = functools.partial(gpu.scan, *given, None, out_dtype="float32", interpret=True)
    none = np.zeros_like(reset)
    y, final = run(post=False, reverse=False)
    expected = op_oracles.linear_scan({"decay": decay, "x": x}, h0, none)
    assert_close((whole(y), whole(final)), expected, TOLERANCE["float32"])
    y, final = run(post=True, reverse=True)
    assert_close(
        (whole(y), whole(final)), post_form(decay, x, h0, none, True), TOLERANCE["float32"]
    )


@interpreted
@pytest.mark.parametrize(
    ("axes", "complex_", "reverse"),
    [("BTD", True, False), ("TD", False, True), ("D", False, False)],
    ids=["complex", "shared over batch, reverse", "constant"],
)
def test_time_in_segments(axes, complex_, reverse, monkeypatch):
    """Check sequences of two steps: a NaN before a reset does not reach another piece."""
    monkeypatch.setattr(gpu, "time_segments", lambda *shape: 3)
    decay, x, h0, reset, dy, d_final = arrays((2, 6, 8), axes, complex_)
    h0[0], reset[0, 5 if reverse else 0] = np.nan, True
    given = [parts(z, "float32") for z in (decay, x, h0, dy, d_final)]
    run = {"reverse": reverse, "out_dtype": "float32", "interpret": True}
    y, final = gpu.scan(*given[:3], reset, post=False, **run)
    inputs = {"decay": decay[tuple(0 if n == 1 else slice(None) for n in decay.shape[:2])], "x": x}
    expected = op_oracles.linear_scan(inputs, h0, reset, reverse)
    assert_close((whole(y), whole(final)), expected, TOLERANCE["float32"])
    found = gpu.adjoint(given[0], y, given[2], reset, *given[3:], **run)
    cotangents = adjoint(decay, expected[0], h0, reset, dy, d_final, reverse)
    assert_close(tuple(map(whole, found)), cotangents, TOLERANCE["float32"])


def test_time_is_split_where_the_chip_is_not_full():
    assert time_segments(8, 4096, 2560) == 1  # 160 thread blocks
    assert time_segments(1, 8192, 2048) == 16  # 16: as many as make 256 of them
    assert time_segments(1, 1024, 128) == 4  # segments of 256 steps
    assert time_segments(1, 8191, 128) == 1  # which 2 does not divide
    text = lowered(by_kernel, (1, 1024, 128), (1, 1024, 128))
    assert text.count(KERNEL) == 2


@interpreted
def test_nothing_crosses_a_reset():
    decay, x, h0, reset, *_ = arrays((1, 12, 128), "BTD")
    reset[:], reset[0, 7] = False, True
    x[0, 5], decay[0, 7], h0[:] = np.nan, np.inf, np.nan
    y, final = gpu.scan(
        *(parts(array, "float32") for array in (decay, x, h0)), reset,
        post=False, reverse=False, out_dtype="float32", interpret=True,
    )  # fmt: skip
    assert np.isnan(whole(y)[0, :7]).all()
    expected = op_oracles.linear_scan({"decay": decay, "x": x}, h0, reset)
    assert_close((whole(y)[:, 7:], whole(final)), (expected[0][:, 7:], expected[1]), 2e-5)


@interpreted
def test_vmap():
    """Map over all arguments except the decays."""
    decay, x, h0, reset, dy, d_final = arrays((4, 9, 8), "TD")
    mapped = [z.reshape(2, 2, *z.shape[1:]) for z in (x, h0, reset, dy, d_final)]

    def both(x, h0, reset, dy, d_final):
        given = [parts(z, "float32") for z in (decay, x, h0, dy, d_final)]
        run = {"reverse": False, "out_dtype": "float32", "interpret": True}
        y, final = gpu.scan(*given[:3], reset, post=False, **run)
        return y, final, *gpu.adjoint(given[0], y, given[2], reset, *given[3:], **run)

    y, final, da, dx, dh = map(whole, jax.vmap(both)(*map(jnp.asarray, mapped)))
    expected = op_oracles.linear_scan({"decay": decay[0], "x": x}, h0, reset)
    cotangents = adjoint(decay, expected[0], h0, reset, dy, d_final, False)
    found = (y.reshape(x.shape), final.reshape(h0.shape), da.sum(0), dx.reshape(x.shape))
    assert_close((*found, dh.reshape(h0.shape)), (*expected, *cotangents), 2e-5)


def lowered(run, *shapes):
    """Return the program lowered for GPU, without a GPU."""
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def by_kernel(decay, x):
    return seqjax.linear_scan(decay, x, implementation="pallas")[0]


def test_its_backward_pass_is_a_kernel():
    def gradients(decay, x):
        return jax.grad(lambda *args: jnp.sum(by_kernel(*args)), argnums=(0, 1))(decay, x)

    assert lowered(gradients, (2, 32, 128), (2, 32, 128)).count(KERNEL) == 2


@pytest.mark.parametrize(
    ("width", "keywords", "message"),
    [
        (3, {}, r"multiples of 16 bytes, got D=3 numbers of float32.*multiple of 4"),
        (256, {"block_sizes": (16, 256)}, "must have 128 features, got 256"),
        (128, {"block_sizes": (1024, 128)}, "must have at most .* steps .*got 1024"),
    ],
    ids=["alignment", "features", "steps"],
)
def test_what_it_cannot_do(width, keywords, message):
    run = functools.partial(seqjax.linear_scan, implementation="pallas", **keywords)
    with pytest.raises(NotImplementedError, match=f"^linear_scan: .*{message}"):
        lowered(run, (width,), (2, 2048, width))
