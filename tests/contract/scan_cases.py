"""Rows of the scans that are not sums: logarithms, and steps in order."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.case import Arrays, Case, normal
from tests.oracles import op_oracles

D = 3


def _log_inputs(decay_axes: str | None) -> Callable[..., Arrays]:
    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        sizes = {"B": batch, "T": length, "D": D}
        x, decay = normal(rng, batch, length, D), None
        if decay_axes is not None:
            decay = rng.uniform(-1.0, 0.2, tuple(sizes[axis] for axis in decay_axes))
        return {"log_decay": decay, "x": x}

    return make


def _hard_logarithms(rng: np.random.Generator, inputs: Arrays) -> Arrays:
    """Return inputs of the size 100 and normal ones, with decays to the limit."""
    x = inputs["x"] + rng.choice([-100.0, 0.0, 100.0], inputs["x"].shape)
    decays = np.array([-np.inf, 0.0, -30.0, -1e-7, -0.1])
    return inputs | {"x": x, "log_decay": rng.choice(decays, inputs["log_decay"].shape)}


def _log(name: str, semiring: str, axes: str | None = "BTD") -> Case:
    def run(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        options = {"initial_state": state, "semiring": semiring, "reset": reset}
        return seqjax.log_scan(**inputs, **options, **keywords)

    def oracle(inputs: Arrays, state: np.ndarray, reset: np.ndarray) -> tuple[Any, Any]:
        # The test without a state gives zeros to the oracle. Here no state is -inf.
        state = state if state.any() else np.full_like(state, -np.inf)
        return op_oracles.log_scan(inputs, state, reset, semiring)

    return Case(
        name=name,
        inputs=_log_inputs(axes),
        run=run,
        oracle=oracle,
        state=lambda rng, batch: normal(rng, batch, D),
        algorithms=("chunked", "sequential", "associative"),
        timed=("x", "log_decay") if axes == "BTD" else ("x",),
        shared=("log_decay",) if axes == "TD" else (),
        hard=_hard_logarithms if axes == "BTD" else None,
    )


def _step(params: Arrays, state: Arrays, x: Any) -> tuple[Arrays, Any]:
    """Take a step of two coupled states, without a parallel form."""
    W, rate, now = (z.astype(state["fast"].dtype) for z in (params["W"], params["rate"], x))
    fast = jnp.tanh(W @ state["fast"] + now - state["slow"] ** 2)
    slow = state["slow"] + rate * (fast - state["slow"])
    return {"fast": fast, "slow": slow}, (fast * slow).astype(x.dtype)


def _step_inputs(rng: np.random.Generator, batch: int, length: int) -> Arrays:
    params = {"W": 0.5 * normal(rng, D, D), "rate": rng.uniform(0.1, 0.9, D)}
    return {"params": params, "x": normal(rng, batch, length, D)}


def _run_steps(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
    if state is None:
        zeros = jnp.zeros((inputs["x"].shape[0], D))
        state = {"fast": zeros, "slow": zeros}
    return seqjax.step_scan(_step, inputs["params"], inputs["x"], state, reset=reset, **keywords)


SCANS = [
    _log("log_scan", "log"),
    _log("log_scan-max", "max"),
    _log("log_scan-shared_over_batch", "log", "TD"),
    _log("log_scan-without_decay", "log", None),
    Case(
        name="step_scan",
        inputs=_step_inputs,
        run=functools.partial(_run_steps, chunk_size=4),
        oracle=op_oracles.step_scan,
        state=lambda rng, batch: {name: 0.5 * normal(rng, batch, D) for name in ("fast", "slow")},
        algorithms=("sequential",),
        timed=("x",),
    ),
]
