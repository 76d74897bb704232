"""Rows of the contract tests: one row for each op."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.case import Arrays, Case, D, H, K, N, V, normal, unit
from tests.contract.case import op as _op
from tests.contract.scan_cases import SCANS
from tests.contract.ssm_cases import SSM_OPS
from tests.oracles import op_oracles, rnn_oracles


def _hard_decays(name: str, kind: str) -> Callable[..., Arrays]:
    """Return decays 0, 1, exp(-30), 1 - 1e-7 and normal values, mixed; keep an absent decay."""

    def harden(rng: np.random.Generator, inputs: Arrays) -> Arrays:
        if name not in inputs:
            return inputs
        values = np.array([0.0, 1.0, np.exp(-30.0), 1 - 1e-7, 0.9])
        with np.errstate(divide="ignore"):
            values = np.log(values) if kind == "log" else values
        hard = rng.choice(values, inputs[name].shape)
        return inputs | {name: hard.astype(inputs[name].dtype)}

    return harden


def _hard_keys(rng: np.random.Generator, inputs: Arrays) -> Arrays:
    """Return keys of any length, with beta |k|^2 in [0, 2], and hard decays."""
    norms = 10 ** rng.uniform(-2, 2, inputs["beta"].shape)
    k = unit(inputs["k"]) * norms[..., None]
    strength = rng.choice([0.0, 0.3, 1.0, 1.7, 2.0], norms.shape)
    made = inputs | {"k": k, "beta": strength / np.sum(k**2, axis=-1)}
    return _hard_decays("log_decay", "log")(rng, made)


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
        hard=_hard_decays("decay", "linear"),
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


def _attention_inputs(decay: str | None, complex_: bool = False) -> Callable[..., Arrays]:
    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = {
            "q": normal(rng, batch, length, H, K, complex_=complex_),
            "k": normal(rng, batch, length, H, K, complex_=complex_),
            "v": normal(rng, batch, length, H, V, complex_=complex_),
        }
        if decay is not None:
            shape = (batch, length, H) if decay == "scalar" else (batch, length, H, K)
            made["log_decay"] = -rng.uniform(0.0, 1.0, shape)
            if complex_:
                made["log_decay"] = made["log_decay"] + 1j * rng.uniform(-3, 3, shape)
        return made

    return make


MATRIX = ("chunked", "sequential", "associative")


def _in_small_chunks(run: Callable[..., Any]) -> Callable[..., Any]:
    """Use chunks of 8, the smallest of the kernels, so that a test has several chunks."""

    def small(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        chunk = {"chunk_size": 8} if keywords.get("implementation") == "pallas" else {}
        return run(inputs, state, reset, **chunk, **keywords)

    return small


def _attention(name: str, decay: str | None, complex_: bool = False) -> Case:
    names = ("q", "k", "v") if decay is None else ("q", "k", "v", "log_decay")
    return Case(
        name=name,
        inputs=_attention_inputs(decay, complex_),
        run=_in_small_chunks(_op(seqjax.linear_attention, ("q", "k", "v", "log_decay"))),
        oracle=op_oracles.linear_attention,
        state=lambda rng, batch: normal(rng, batch, H, K, V, complex_=complex_),
        # Interpreted kernels compile slowly: other forms are in test_matrix_kernels.
        algorithms=(*MATRIX, "pallas") if decay == "scalar" else MATRIX,
        timed=names,
        hard=_hard_decays("log_decay", "log"),
    )


def _delta_inputs(decay: str | None, top: float) -> Callable[..., Arrays]:
    attention = _attention_inputs(decay)

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = attention(rng, batch, length)
        # Unnormalised keys: beta |k|^2 anywhere up to `top`.
        made["k"] = unit(made["k"]) * rng.uniform(0.3, 2.0, (batch, length, H, 1))
        made["beta"] = rng.uniform(0, top, (batch, length, H)) / np.sum(made["k"] ** 2, axis=-1)
        return made

    return make


def _delta(name: str, decay: str | None, top: float = 1.0) -> Case:
    names = ("q", "k", "v", "beta", *(() if decay is None else ("log_decay",)))
    return Case(
        name=name,
        inputs=_delta_inputs(decay, top),
        run=_in_small_chunks(_op(seqjax.delta_rule, ("q", "k", "v", "beta", "log_decay"))),
        oracle=op_oracles.delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=(*MATRIX, "pallas") if decay == "channel" else MATRIX,
        timed=names,
        hard=_hard_keys,
    )


def _generalized_inputs(rng: np.random.Generator, batch: int, length: int) -> Arrays:
    """RWKV-7's transition, diag(w) - k (e k)^T with |k| = 1 and e in [0, 1]."""
    made = _attention_inputs("channel")(rng, batch, length)
    direction = unit(normal(rng, batch, length, H, K))
    made["a"] = direction
    made["b"] = -direction * rng.uniform(0, 1, (batch, length, H, K))
    return made


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
    _attention("linear_attention", None),
    _attention("linear_attention-scalar", "scalar"),
    _attention("linear_attention-channel", "channel"),
    _attention("linear_attention-complex", "channel", complex_=True),
    _delta("delta_rule", None),
    _delta("delta_rule-negative", None, top=2.0),
    _delta("delta_rule-scalar", "scalar", top=2.0),
    _delta("delta_rule-channel", "channel", top=2.0),
    Case(
        name="generalized_delta_rule",
        inputs=_generalized_inputs,
        run=_op(seqjax.generalized_delta_rule, ("q", "k", "v", "a", "b", "log_decay")),
        oracle=op_oracles.generalized_delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=("chunked", "sequential", "associative"),
        timed=("q", "k", "v", "a", "b", "log_decay"),
        hard=_hard_decays("log_decay", "log"),
    ),
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
