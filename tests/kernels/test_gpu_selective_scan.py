"""Interpreted selective scan for GPU against a float64 loop, and its errors.

As `test_gpu_kernels` does for the linear one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from pallas_kernels.selective_scan import gpu
from tests.contract.harness import assert_close
from tests.kernels.gpu import KERNEL, TOLERANCE, interpreted, narrowed, whole

NAMES = ("x", "dt", "A", "B", "C", "D", "h0")


def arrays(shape, states, dtype="float32", seed=0):
    """Draw the arguments by name, resets, and cotangents of the outputs and the final state."""
    rng = np.random.default_rng(seed)
    B, T, D = shape
    wide = [-rng.uniform(0.2, 2.0, (D, states))]
    wide += [rng.standard_normal(s) for s in ((B, T, states), (B, T, states), (D,))]
    wide += [rng.standard_normal((B, D, states)) for _ in range(2)]
    timed = rng.standard_normal(shape), rng.uniform(0.05, 1.0, shape), rng.standard_normal(shape)
    x, dt, dy = narrowed(timed, dtype)
    *rest, d_final = narrowed(wide, "float32")
    return dict(zip(NAMES, (x, dt, *rest), strict=True)), rng.random((B, T)) < 0.1, dy, d_final


def loop(given, reset, dy, d_final):
    """Compute (y, final state) and the cotangents in a loop that stores all states."""
    x, dt, A, B, C, D, h = (given[name] for name in NAMES)
    cut, y, states = reset[..., None, None], np.zeros_like(x), [h]
    steps = [
        (dt[:, t, :, None], x[:, t, :, None], B[:, t, None], C[:, t, None], cut[:, t], dy[:, t])
        for t in range(x.shape[1])
    ]
    for t, (dt_t, x_t, B_t, C_t, cut_t, _) in enumerate(steps):
        h = np.where(cut_t, 0, np.exp(dt_t * A) * h) + dt_t * x_t * B_t
        y[:, t] = np.sum(h * C_t, -1) + D * x[:, t]
        states.append(h)
    found = {name: np.zeros_like(given[name]) for name in NAMES}
    lam = d_final
    for t, (dt_t, x_t, B_t, C_t, cut_t, dy_t) in reversed(list(enumerate(steps))):
        total = lam + C_t * dy_t[..., None]
        found["C"][:, t] = np.sum(states[t + 1] * dy_t[..., None], 1)
        found["B"][:, t] = np.sum(total * dt_t * x_t, 1)
        lam = np.where(cut_t, 0, np.exp(dt_t * A) * total)
        change, write = np.where(cut_t, 0, lam * states[t]), np.sum(total * B_t, -1)
        found["x"][:, t] = write * dt[:, t] + D * dy_t
        found["dt"][:, t] = write * x[:, t] + np.sum(change * A, -1)
        found["A"] += np.sum(change * dt_t, 0)
        found["D"] += np.sum(dy_t * x[:, t], 0)
    found["h0"] = lam
    return (y, h), tuple(found.values())


def kernel(given, reset, dy, d_final, dtype="float32"):
    """Compute the results of `loop` with the kernel, whose states are [B, N, D]."""
    x, dt, dy = (jnp.asarray(z, dtype) for z in (given["x"], given["dt"], dy))
    A, B, C, D, h0, d_final = (
        jnp.asarray(z, "float32") for z in (*(given[k] for k in NAMES[2:]), d_final)
    )
    args = (x, dt, A.T, B, C, D[None])
    y, final, borders = gpu.forward(*args, h0.mT, reset, save_states=True, interpret=True)
    dx, d_dt, dA, dB, dC, dD, dh0 = gpu.backward(
        *args, reset, borders, dy, d_final.mT, interpret=True
    )
    assert y.dtype == dx.dtype == d_dt.dtype == dtype
    outputs, cotangents = (y, final.mT), (dx, d_dt, dA.T, dB, dC, dD[0], dh0.mT)
    return tuple(tuple(whole((z,)) for z in part) for part in (outputs, cotangents))


@interpreted
@pytest.mark.parametrize(
    ("shape", "states", "dtype", "resets"),
    [
        # Several blocks of 64 steps, a ragged group of 8, and a single row.
        pytest.param((1, 73, 128), 2, "float32", True, id="over a border"),
        pytest.param((2, 9, 136), 3, "float32", True, id="blocks that hang over"),
        pytest.param((1, 16, 8), 1, "float32", False, id="one state, without resets"),
        pytest.param((1, 12, 128), 2, "bfloat16", True, id="bfloat16"),
    ],
)
def test_values_and_gradients(shape, states, dtype, resets):
    given, reset, dy, d_final = arrays(shape, states, dtype)
    expected = loop(given, reset & resets, dy, d_final)
    found = kernel(given, reset if resets else None, dy, d_final, dtype)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, TOLERANCE[dtype])


@interpreted
def test_nothing_crosses_a_reset():
    given, reset, dy, d_final = arrays((1, 12, 128), 1)
    reset[:], reset[0, 7] = False, True
    given["x"][0, 5], given["h0"][:] = np.nan, np.nan
    outputs, cotangents = kernel(given, reset, dy, d_final)
    assert np.isnan(outputs[0][0, :7]).all()
    for name in ("x", "dt", "B", "C"):
        given[name] = given[name][:, 7:]
    given["h0"] = np.zeros_like(given["h0"])
    after = loop(given, reset[:, 7:], dy[:, 7:], d_final)
    assert_close((outputs[0][:, 7:], outputs[1]), after[0], TOLERANCE["float32"])
    late = tuple(cotangents[NAMES.index(name)][:, 7:] for name in ("x", "dt", "B", "C"))
    wanted = tuple(after[1][NAMES.index(name)] for name in ("x", "dt", "B", "C"))
    assert_close(late, wanted, TOLERANCE["float32"])
    given, *_ = arrays((1, 12, 128), 1)
    for name in ("x", "dt", "B", "C"):
        given[name] = given[name][:, :7]
    before = loop(given, reset[:, :7], dy[:, :7], np.zeros_like(d_final))
    assert_close(cotangents[-1:], before[1][-1:], TOLERANCE["float32"])  # x has no part in it


def program(width=128, states=16, gradients=False, **keywords):
    """Return the program lowered for GPU, without a GPU."""
    shapes = [(2, 32, width), (2, 32, width), (width, states), (2, 32, states), (2, 32, states)]
    op = functools.partial(seqjax.selective_scan, **keywords)

    def back(*args):
        return jax.grad(lambda *args: jnp.sum(op(*args)[0]), range(5))(*args)

    run = back if gradients else op
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def test_its_backward_pass_is_a_kernel():
    assert program(states=4, gradients=True, implementation="pallas").count(KERNEL) == 2


@pytest.mark.parametrize(
    ("width", "states", "keywords", "message"),
    [
        (6, 4, {}, r"multiples of 16 bytes, got D=6 numbers of float32.*multiple of 4"),
        (128, 17, {}, "supports at most 16 states per channel, got N=17"),
        (128, 4, {"block_sizes": (64, 128)}, "must be None on GPU.*got .*; leave it out"),
    ],
    ids=["alignment", "states", "block sizes"],
)
def test_what_it_cannot_do(width, states, keywords, message):
    with pytest.raises(NotImplementedError, match=f"^selective_scan: .*{message}"):
        program(width, states, implementation="pallas", **keywords)
