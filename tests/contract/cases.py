"""Rows of the contract tests: one row for each op."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.case import Arrays, Case, D, N, V, hard_decays, normal
from tests.contract.case import op as _op
from tests.contract.matrix_cases import MATRIX_OPS
from tests.contract.scan_cases import SCANS
from tests.contract.ssm_cases import SSM_OPS
from tests.oracles import op_oracles, rnn_oracles


def _hard_steps(rng: np.random.Generator, inputs: Arrays) -> Arrays:
    """Return time steps that forget all, nothing, and values between."""
    return inputs | {"dt": rng.choice([0.0, 1e-6, 0.1, 1.0, 1e4], inputs["dt"].shape)}


def _linear_inputs(decay_axes: str, complex_: bool) -> Callable[..., Arrays]:
    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        shape = tuple({"B": batch, "T": length, "D": D}[axis] for axis in decay_axes)
        decay = rng.uniform(0.5, 1.0, shape)
        if complex_:
            decay = decay * np.exp(1j * rng.uniform(0, 3, shape))
        return {"decay": decay, "x": normal(rng, batch, length, D, complex_=complex_)}

    return make


def _linear(name: str, axes: str, complex_: bool = False, reverse: bool = False) -> Case:
    return Case(
        name=name,
        inputs=_linear_inputs(axes, complex_),
        run=_op(seqjax.linear_scan, ("decay", "x"), reverse=reverse),
        oracle=functools.partial(op_oracles.linear_scan, reverse=reverse),
        state=lambda rng, batch: normal(rng, batch, D, complex_=complex_),
        algorithms=("sequential", "associative", "chunked", "pallas"),
        timed=("decay", "x") if axes == "BTD" else ("x",),
        shared=("decay",) if axes == "TD" else (),
        hard=hard_decays("decay", "linear"),
        reverse=reverse,
    )


def _selective(name: str, *algorithms: str, decay: str = "exp") -> Case:
    def harden(rng: np.random.Generator, inputs: Arrays) -> Arrays:
        hard = _hard_steps(rng, inputs)
        return _online(hard) if decay == "online" else hard

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        inputs = _selective_inputs(rng, batch, length)
        return _online(inputs) if decay == "online" else inputs

    def run(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        without = {"A": None} if decay == "online" else {}
        return seqjax.selective_scan(
            **inputs, **without, initial_state=state, reset=reset, decay=decay, **keywords
        )

    return Case(
        name=name,
        inputs=make,
        run=run,
        oracle=functools.partial(op_oracles.selective_scan, decay=decay),
        state=lambda rng, batch: normal(rng, batch, D, N),
        algorithms=algorithms,
        timed=("x", "dt", "B", "C"),
        hard=harden,
    )


def _online(inputs: Arrays) -> Arrays:
    """Return Longhorn's arguments: no A, and steps dt / (1 + dt |B|^2), for decays in [0, 1]."""
    square = np.sum(inputs["B"] ** 2, axis=-1, keepdims=True)
    dt = inputs["dt"] / (1 + inputs["dt"] * square)
    return {name: value for name, value in inputs.items() if name != "A"} | {"dt": dt}


def _selective_inputs(rng: np.random.Generator, batch: int, length: int) -> Arrays:
    return {
        "x": normal(rng, batch, length, D),
        "dt": rng.uniform(0.05, 1.0, (batch, length, D)),
        "A": -rng.uniform(0.2, 2.0, (D, N)),
        "B": normal(rng, batch, length, N),
        "C": normal(rng, batch, length, N),
        "D": normal(rng, D),
    }


def softmax_combine(early: Arrays, late: Arrays) -> Arrays:
    top = jnp.maximum(early["score"], late["score"])
    old, new = jnp.exp(early["score"] - top), jnp.exp(late["score"] - top)
    return {
        "score": top,
        "weight": old * early["weight"] + new * late["weight"],
        "value": old * early["value"] + new * late["value"],
    }


def _softmax_inputs(rng: np.random.Generator, batch: int, length: int) -> Arrays:
    return {
        "score": normal(rng, batch, length),
        "weight": rng.uniform(0.5, 1.5, (batch, length)),
        "value": normal(rng, batch, length, V),
    }


def _run_softmax(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
    return seqjax.monoid_scan(softmax_combine, inputs, initial_state=state, reset=reset, **keywords)


def cell_params(rng: np.random.Generator, cell: Any, scale: float = 1.0) -> Arrays:
    """Draw the recurrent parameters of a cell at a weight scale."""
    return {name: scale * rng.standard_normal(cell.param_shape(name)) for name in cell.recurrent}


def _nonlinear(structure: str, cell: Any) -> Case:
    """Return a row for a cell of each Jacobian structure; layers have separate rows."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        return {"params": cell_params(rng, cell), "x": normal(rng, batch, length, cell.gates, D)}

    def state(rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.uniform(-0.9, 0.9, cell.initial_state(batch).shape)

    def run(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        if state is None:
            state = cell.initial_state(len(inputs["x"]))
        hs, final, _ = seqjax.nonlinear_scan(
            cell, inputs["params"], inputs["x"], state, reset=reset, **keywords
        )
        return hs, final

    return Case(
        name=f"nonlinear_scan-{structure}",
        inputs=make,
        run=run,
        oracle=functools.partial(rnn_oracles.nonlinear_scan, cell),
        state=state,
        algorithms=("newton", "sequential"),
        timed=("x",),
    )


OPS = [
    _linear("linear_scan", "BTD"),
    _linear("linear_scan-shared_over_batch", "TD"),
    _linear("linear_scan-time_invariant", "D"),
    _linear("linear_scan-complex", "BTD", complex_=True),
    _linear("linear_scan-reverse", "BTD", reverse=True),
    *SCANS,
    *SSM_OPS,
    _selective("selective_scan", "sequential", "chunked", "pallas"),
    _selective("selective_scan-signed", "sequential", "chunked", decay="signed"),
    _selective("selective_scan-online", "sequential", "chunked", decay="online"),
    *MATRIX_OPS,
    Case(
        name="monoid_scan-softmax",
        inputs=_softmax_inputs,
        run=_run_softmax,
        oracle=op_oracles.running_softmax,
        state=lambda rng, batch: jax.tree.map(lambda e: e[:, 0], _softmax_inputs(rng, batch, 1)),
        algorithms=("chunked", "sequential", "associative"),
        timed=("score", "weight", "value"),
    ),
    _nonlinear("diagonal", seqjax.cells.ParaGRU(D)),
    _nonlinear("block", seqjax.cells.ParaLSTM(D)),
    _nonlinear("dense", seqjax.cells.GRU(D)),
]
