"""Rows of the contract tests: ops with a matrix state."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import seqjax
from tests.contract.case import Arrays, Case, H, K, V, hard_decays, normal, unit
from tests.contract.case import op as _op
from tests.oracles import op_oracles

MATRIX = ("chunked", "sequential", "associative")


def _in_small_chunks(run: Callable[..., Any]) -> Callable[..., Any]:
    """Use chunks of 8, the smallest of the kernels, so that a test has several chunks."""

    def small(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        chunk = {"chunk_size": 8} if keywords.get("implementation") == "pallas" else {}
        return run(inputs, state, reset, **chunk, **keywords)

    return small


def _hard_keys(rng: np.random.Generator, inputs: Arrays) -> Arrays:
    """Return keys of any length, with beta |k|^2 in [0, 2], and hard decays."""
    norms = 10 ** rng.uniform(-2, 2, inputs["k"].shape[:-1])
    k = unit(inputs["k"]) * norms[..., None]
    strength = rng.choice([0.0, 0.3, 1.0, 1.7, 2.0], inputs["beta"].shape)
    made = inputs | {"k": k, "beta": strength / np.sum(k**2, axis=-1)}
    return hard_decays("log_decay", "log")(rng, made)


def _attention_inputs(
    decay: str | None, complex_: bool = False, groups: int = H
) -> Callable[..., Arrays]:
    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = {
            "q": normal(rng, batch, length, groups, K, complex_=complex_),
            "k": normal(rng, batch, length, groups, K, complex_=complex_),
            "v": normal(rng, batch, length, H, V, complex_=complex_),
        }
        if decay is not None:
            shape = (batch, length, H) if decay == "scalar" else (batch, length, H, K)
            made["log_decay"] = -rng.uniform(0.0, 1.0, shape)
            if complex_:
                made["log_decay"] = made["log_decay"] + 1j * rng.uniform(-3, 3, shape)
        return made

    return make


def _attention(name: str, decay: str | None, complex_: bool = False, groups: int = H) -> Case:
    names = ("q", "k", "v") if decay is None else ("q", "k", "v", "log_decay")
    return Case(
        name=name,
        inputs=_attention_inputs(decay, complex_, groups),
        run=_in_small_chunks(_op(seqjax.linear_attention, ("q", "k", "v", "log_decay"))),
        oracle=op_oracles.linear_attention,
        state=lambda rng, batch: normal(rng, batch, H, K, V, complex_=complex_),
        # Interpreted kernels compile slowly: other forms are in test_matrix_kernels.
        algorithms=(*MATRIX, "pallas") if decay == "scalar" else MATRIX,
        timed=names,
        hard=hard_decays("log_decay", "log"),
    )


def _exclusive(name: str) -> Case:
    """Return a row whose outputs read the state before the step."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = _attention_inputs("channel", groups=1)(rng, batch, length)
        return made | {"bonus": normal(rng, H, K)}

    names = ("q", "k", "v", "log_decay")
    run = _op(seqjax.linear_attention, (*names, "bonus"), exclusive=True)
    return Case(
        name=name,
        inputs=make,
        run=_in_small_chunks(run),
        oracle=functools.partial(op_oracles.linear_attention, exclusive=True),
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=MATRIX,
        timed=names,
        hard=hard_decays("log_decay", "log"),
    )


def _normalized(name: str) -> Case:
    """Return a row with the sums of the keys as a second output."""
    names = ("q", "k", "v", "log_decay")

    def state(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        return normal(rng, batch, H, K, V), normal(rng, batch, H, K)

    return Case(
        name=name,
        inputs=_attention_inputs("scalar"),
        run=_in_small_chunks(_op(seqjax.linear_attention, names, normalizer=True)),
        oracle=op_oracles.normalized_attention,
        state=state,
        algorithms=MATRIX,
        timed=names,
        hard=hard_decays("log_decay", "log"),
    )


def _value_decay(name: str) -> Case:
    """Return a row whose states decay by column."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = _attention_inputs(None)(rng, batch, length)
        return made | {"value_log_decay": -rng.uniform(0, 1, made["v"].shape)}

    names = ("q", "k", "v", "value_log_decay")
    return Case(
        name=name,
        inputs=make,
        run=_op(seqjax.linear_attention, names),
        oracle=op_oracles.linear_attention,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=MATRIX,
        timed=names,
        hard=hard_decays("value_log_decay", "log"),
    )


def _delta_inputs(decay: str | None, top: float, groups: int = H) -> Callable[..., Arrays]:
    attention = _attention_inputs(decay, groups=groups)

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = attention(rng, batch, length)
        # Unnormalised keys: beta |k|^2 anywhere up to `top`.
        made["k"] = unit(made["k"]) * rng.uniform(0.3, 2.0, (batch, length, groups, 1))
        made["beta"] = rng.uniform(0, top, (batch, length, H)) / np.sum(made["k"] ** 2, axis=-1)
        return made

    return make


def _delta(name: str, decay: str | None, top: float = 1.0, groups: int = H) -> Case:
    names = ("q", "k", "v", "beta", *(() if decay is None else ("log_decay",)))
    return Case(
        name=name,
        inputs=_delta_inputs(decay, top, groups),
        run=_in_small_chunks(_op(seqjax.delta_rule, ("q", "k", "v", "beta", "log_decay"))),
        oracle=op_oracles.delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=(*MATRIX, "pallas") if decay == "channel" else MATRIX,
        timed=names,
        hard=_hard_keys,
    )


def _fused(name: str, decay: str, groups: int = H) -> Case:
    """Return a row whose op normalizes q and k and applies the gate of the decays."""
    arrays = ("q", "k", "v", "beta", "log_decay")

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = _attention_inputs(decay, groups=groups)(rng, batch, length)
        made["beta"] = rng.uniform(0, 2, (batch, length, H))
        made["log_decay"] = normal(rng, *made["log_decay"].shape)
        bias = (H,) if decay == "scalar" else (H, K)
        return made | {"A_log": rng.uniform(-1, 1, H), "dt_bias": normal(rng, *bias)}

    def run(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        gate = seqjax.ops.SoftplusGate(inputs["A_log"], inputs["dt_bias"])
        given = {name: inputs[name] for name in arrays}
        return seqjax.delta_rule(
            **given, initial_state=state, normalize=True, gate=gate, reset=reset, **keywords
        )

    def harden(rng: np.random.Generator, inputs: Arrays) -> Arrays:
        """Return vectors of any length, and gates that are closed, open and between."""
        made = dict(inputs)
        for x in ("q", "k"):
            made[x] = unit(inputs[x]) * 10 ** rng.uniform(-2, 2, (*inputs[x].shape[:-1], 1))
        values = np.array([-np.inf, -30.0, -1.0, 0.0, 30.0, 1e4])
        hard = rng.choice(values, inputs["log_decay"].shape)
        return made | {"log_decay": hard.astype(inputs["log_decay"].dtype)}

    return Case(
        name=name,
        inputs=make,
        run=_in_small_chunks(run),
        oracle=op_oracles.fused_delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=(*MATRIX, "pallas"),
        timed=arrays,
        hard=harden,
    )


def _momentum(name: str) -> Case:
    """Return a row with steps small enough for the momentum: e^h = 0.9 amplifies them tenfold."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = _attention_inputs(None)(rng, batch, length)
        made["k"] = unit(made["k"])
        made["beta"] = rng.uniform(0, 0.5, (batch, length, H))
        made["log_decay"] = -rng.uniform(0.0, 0.3, (batch, length, H))
        return made | {"log_momentum": -rng.uniform(0.1, 1.0, (batch, length, H))}

    def harden(rng: np.random.Generator, inputs: Arrays) -> Arrays:
        hard = hard_decays("log_decay", "log")(rng, inputs)
        slow = np.log(np.array([1e-30, np.exp(-30.0), 0.5, 0.9]))
        momentum = rng.choice(slow, inputs["log_momentum"].shape)
        momentum[:, ::7] = -np.inf
        return hard | {"log_momentum": momentum.astype(inputs["log_momentum"].dtype)}

    names = ("q", "k", "v", "beta", "log_decay", "log_momentum")
    return Case(
        name=name,
        inputs=make,
        run=_op(seqjax.momentum_delta_rule, names),
        oracle=op_oracles.momentum_delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, 2, K, V),
        algorithms=MATRIX,
        timed=names,
        hard=harden,
    )


def _generalized(name: str, groups: int = H) -> Case:
    """Return a row with RWKV-7's transition, diag(w) - k (e k)^T with |k| = 1 and e in [0, 1]."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = _attention_inputs("channel", groups=groups)(rng, batch, length)
        direction = unit(normal(rng, batch, length, groups, K))
        made["a"] = direction
        made["b"] = -direction * rng.uniform(0, 1, (batch, length, H, K))
        return made

    return Case(
        name=name,
        inputs=make,
        run=_in_small_chunks(
            _op(seqjax.generalized_delta_rule, ("q", "k", "v", "a", "b", "log_decay"))
        ),
        oracle=op_oracles.generalized_delta_rule,
        state=lambda rng, batch: normal(rng, batch, H, K, V),
        algorithms=(*MATRIX, "pallas"),
        timed=("q", "k", "v", "a", "b", "log_decay"),
        hard=hard_decays("log_decay", "log"),
    )


MATRIX_OPS = [
    _attention("linear_attention", None),
    _attention("linear_attention-scalar", "scalar"),
    _attention("linear_attention-channel", "channel"),
    _attention("linear_attention-shared", "scalar", groups=1),
    _exclusive("linear_attention-exclusive"),
    _normalized("linear_attention-normalizer"),
    _value_decay("linear_attention-values"),
    _attention("linear_attention-complex", "channel", complex_=True),
    _delta("delta_rule", None),
    _delta("delta_rule-negative", None, top=2.0),
    _delta("delta_rule-scalar", "scalar", top=2.0),
    _delta("delta_rule-shared", "channel", top=2.0, groups=1),
    _delta("delta_rule-channel", "channel", top=2.0),
    _fused("delta_rule-fused", "channel"),
    _fused("delta_rule-fused-scalar", "scalar", groups=1),
    _momentum("momentum_delta_rule"),
    _generalized("generalized_delta_rule"),
    _generalized("generalized_delta_rule-shared", groups=1),
]
