"""Rows of the scans that are not sums: logarithms, and steps in order."""

from collections.abc import Callable
from typing import Any

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


SCANS = [
    _log("log_scan", "log"),
    _log("log_scan-max", "max"),
    _log("log_scan-shared_over_batch", "log", "TD"),
    _log("log_scan-without_decay", "log", None),
]
