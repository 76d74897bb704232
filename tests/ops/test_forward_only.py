"""Algorithms of a forward pass without derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.ops.core.checkpointed_scan import time_scan
from seqjax.ops.core.custom_adjoint import unless_differentiated

ROW, GATE = (1, 32, 1, 64), (1, 32, 1)


def _arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _choose(x, reset, flag):
    run = unless_differentiated(
        lambda x, reset, flag: jnp.where(reset, x, 1.0), lambda x, reset, flag: 2 * x
    )
    return run(x, reset, flag)


def test_derivatives_replace_the_forward_function():
    x, reset = jnp.arange(3.0), jnp.array([False, True, False])
    run = jax.jit(lambda x: _choose(x, reset, None))
    assert run(x).tolist() == [1.0, 1.0, 1.0]
    y, pull = jax.vjp(run, x)
    assert y.tolist() == [0.0, 2.0, 4.0]
    assert pull(jnp.ones(3))[0].tolist() == [2.0, 2.0, 2.0]
    assert jax.jvp(run, (x,), (x,))[1].tolist() == [0.0, 2.0, 4.0]
    slope = jax.grad(lambda x: jnp.sum(_choose(x, x > 1, None)))
    assert jax.vmap(slope)(x[None]).tolist() == [[2.0, 2.0, 2.0]]
    assert slope(x).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests the choice for CPU")
@pytest.mark.parametrize("op", ["delta_rule", "ssm_scan"])
def test_the_default_is_sequential_without_and_chunked_with_gradients(op):
    q, k, v, beta = _arrays(ROW, ROW, ROW, GATE)
    weights = -np.abs(k[0, :8, 0])  # [D, N]
    if op == "ssm_scan":
        v = v[:, :, 0, :8]

    def run(algorithm):
        if op == "delta_rule":
            return jax.jit(lambda v: seqjax.delta_rule(q, k / 8, v, beta, algorithm=algorithm)[0])
        return jax.jit(lambda u: seqjax.ssm_scan(u, *[weights] * 3, algorithm=algorithm)[0])

    def flops(algorithm, with_gradients):
        function = run(algorithm)
        if with_gradients:
            function = jax.jit(lambda v: jax.vjp(run(algorithm), v)[0])
        return function.lower(v).compile().cost_analysis()["flops"]

    step, chunk = (flops(algorithm, False) for algorithm in ("sequential", "chunked"))
    assert step != chunk
    assert flops(None, False) == step
    step, chunk = (flops(algorithm, True) for algorithm in ("sequential", "chunked"))
    assert step != chunk
    assert flops(None, True) == chunk


def test_a_forward_pass_has_one_loop():
    """Chunks of steps cost copies, which only the backward pass requires."""
    [xs] = _arrays((2, 12, 3))

    def run(xs):
        return time_scan(lambda h, x: (h + x, h), jnp.zeros((2, 3)), xs, 4)[0]

    assert str(jax.make_jaxpr(run)(xs)).count("scan[") == 1
    assert str(jax.make_jaxpr(jax.grad(lambda xs: jnp.sum(run(xs))))(xs)).count("scan[") > 1


def test_a_step_may_read_the_state_before_its_decay():
    """The entry "decay" of a step is the decay that multiplies the state."""
    q, k, v, gate = _arrays(ROW, ROW, ROW, GATE)
    log_decay = -np.abs(gate)

    def by_state(S, DS, x):
        return DS + x["k"][..., :, None] * x["v"][..., None, :] - S

    def by_decay(S, DS, x):
        return x["decay"][..., None] * S + x["k"][..., :, None] * x["v"][..., None, :] - S

    ops = [seqjax.ops.MatrixRecurrence("written", step) for step in (by_state, by_decay)]
    for decay in (log_decay, log_decay[..., None] * np.ones_like(k)):
        found, wanted = (op({"q": q, "k": k, "v": v}, decay)[0] for op in ops)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a name other than"):
        seqjax.ops.MatrixRecurrence("named", by_state, inputs={"decay": "B T H"})
