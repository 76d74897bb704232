"""Rows of the layers with exponential gates, also at logarithms of +-60, and of softmax keys."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.case import Arrays, Case
from tests.contract.layer_case import layer_case
from tests.oracles import exponential_oracles, memory_oracles


def _changed(case: Case, name: str, change: Callable[[Arrays, Any], Arrays]) -> Case:
    """Return the row of a layer under another name, with other parameters and inputs."""

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        made = case.inputs(rng, batch, length)
        return made | change(made["params"], made["x"])

    return dataclasses.replace(case, name=name, inputs=make)


def _large_gates(params: Arrays, x: Any) -> Arrays:
    biases = {
        "igate_bias": np.array([0.0, 60.0, -60.0, 60.0]),
        "fgate_bias": np.array([60.0, -60.0, 0.0, 3.0]),
    }
    return {"params": params | biases, "x": x}


# Logarithms of the size 60 are products of two factors of the size 8. With one large factor, the
# differences that judge the gradients would not be accurate enough. bfloat16 holds both factors.
def _large_keys(params: Arrays, x: Any) -> Arrays:
    weight = params["k_proj"]
    weight = 8 * weight / np.linalg.norm(weight, axis=0)
    return {"params": params | {"k_proj": _to_bfloat16(weight)}, "x": 8 * x}


def _large_scores(params: Arrays, x: Any) -> Arrays:
    """Return scores near 60 and -60 in turn: within six steps no weight of the mean vanishes."""
    query = params["query"]
    weight, x = params["k_proj"].copy(), x.copy()
    x[..., 0] = np.where(np.arange(x.shape[1]) % 12 < 6, 8, -8)
    weight[0] = (
        8 * query.shape[1] ** 0.5 * query / np.sum(query**2, axis=1, keepdims=True)
    ).reshape(-1)
    return {"params": params | {"k_proj": _to_bfloat16(weight)}, "x": x}


def _large_shifted_keys(params: Arrays, x: Any) -> Arrays:
    """Return keys near 60 or -60 by sequence, of the present input alone."""
    weight, x = params["key_proj"].copy(), x.copy()
    x[::2, :, 0], x[1::2, :, 0] = 8, -8
    weight[0] = 8
    return {"params": params | {"key_proj": _to_bfloat16(weight), "x_k": np.zeros(4)}, "x": x}


def _to_bfloat16(weight: np.ndarray) -> np.ndarray:
    return weight.astype(jnp.bfloat16).astype(np.float64)


_MLSTM = functools.partial(layer_case, oracle=exponential_oracles.mlstm)
_AAREN = layer_case(seqjax.layers.Aaren(dim=4, heads=2), exponential_oracles.aaren)
# One head of four values: with two, the norm of an output near zero bends sharply.
_LIGHTNET = layer_case(
    seqjax.layers.LightNet(dim=4, heads=1, gate_rank=3), exponential_oracles.lightnet
)
_RWKV4 = layer_case(seqjax.layers.RWKV4(dim=4, layer=1, depth=3), exponential_oracles.rwkv4)

EXPONENTIAL = [
    _MLSTM(seqjax.layers.MLSTM(dim=4, heads=2)),
    _changed(
        # h = C^T q / |n q| without the maximum of the denominator. Where n q nearly cancels, the
        # two rounded sums differ: by 4e-5 in one of 8,000 steps, where |n q| is 3e-4 of |n| |q|.
        dataclasses.replace(
            _MLSTM(seqjax.layers.MLSTM(dim=8, heads=4)),
            tolerance={"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2},
        ),
        "MLSTM-large_gates",
        _large_gates,
    ),
    _MLSTM(seqjax.layers.MLSTM(dim=8, heads=2, variant="7b"), name="MLSTM-7b"),
    _MLSTM(
        seqjax.layers.MLSTM(
            dim=8, heads=2, variant="7b", expand_v=0.5, denominator_eps=0.1, zero_maximum=True
        ),
        name="MLSTM-7b_eps",
    ),
    _MLSTM(seqjax.layers.MLSTM(dim=8, heads=2, variant="sig"), name="MLSTM-sig"),
    _MLSTM(
        seqjax.layers.MLSTM(dim=8, heads=2, variant="sig", normalizer=True),
        name="MLSTM-sig_normalized",
    ),
    _AAREN,
    _changed(_AAREN, "Aaren-large_scores", _large_scores),
    _LIGHTNET,
    _changed(_LIGHTNET, "LightNet-large_keys", _large_keys),
    _RWKV4,
    layer_case(
        seqjax.layers.RWKV4(dim=4, present_share=True),
        exponential_oracles.rwkv4,
        "RWKV4-present",
    ),
    _changed(_RWKV4, "RWKV4-large_keys", _large_shifted_keys),
    layer_case(seqjax.layers.SRWM(dim=6, heads=2), exponential_oracles.srwm),
    layer_case(
        seqjax.layers.SRWM(dim=6, heads=2, input_softmax=True),
        exponential_oracles.srwm,
        "SRWM-input_softmax",
    ),
    layer_case(
        seqjax.layers.RecurrentDeltaNet(dim=6, heads=2), exponential_oracles.recurrent_deltanet
    ),
    layer_case(seqjax.layers.DeltaRNN(dim=6, heads=2, head_dim=2), exponential_oracles.delta_rnn),
    # Conjugate gradients are exact after K = 4 iterations, up to rounding.
    layer_case(seqjax.layers.MesaNet(dim=8, heads=2, iterations=8), memory_oracles.mesanet),
    # Three levels of memory reach over 8 steps, fewer than the tests have.
    layer_case(
        seqjax.layers.LogLinearAttention(dim=8, heads=2, levels=4), memory_oracles.loglinear
    ),
    layer_case(
        seqjax.layers.LogLinearAttention(dim=8, heads=2, levels=5, rule="delta"),
        memory_oracles.loglinear,
        "LogLinearAttention-delta",
    ),
]
