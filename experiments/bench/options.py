"""Times of options of the matrix-state ops, against what they replace."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import seqjax
from experiments.bench.tools import ONLY, Candidates, Table, ratios

B, T, H, K = 2, 1024, 8, 64
Run = Callable[..., jax.Array]


def _with_gradients(run: Run) -> Callable[..., Any]:
    def both(*args: jax.Array) -> Any:
        y, pull = jax.vjp(run, *args)
        return y, pull(y)

    return both


def _pairs() -> dict[str, tuple[Run, Run, tuple[jax.Array, ...]]]:
    """Return by name the op with an option, the reference, and the arguments of both."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), (B, T, *shape))

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, H // x.shape[2], axis=2)

    linear, delta, momentum = (
        seqjax.linear_attention,
        seqjax.delta_rule,
        seqjax.momentum_delta_rule,
    )
    q, k, v = normal(H, K), normal(H, K) / K**0.5, normal(H, K)
    shared_q, shared_k = q[:, :, :1], k[:, :, :1]
    by_head, by_channel = -jax.nn.softplus(normal(H)), -jax.nn.softplus(normal(H, K))
    beta, bonus = jax.nn.sigmoid(normal(H)), jnp.ones((H, K))

    def delayed(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
        late = (jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]) for x in (k, v, g))
        o = linear(q, *late)[0]
        return o + K**-0.5 * jnp.sum(q * k * bonus, axis=-1, keepdims=True) * v

    return {
        "linear_attention, shared heads": (
            lambda q, k, v, g: linear(q, k, v, g)[0],
            lambda q, k, v, g: linear(repeat(q), repeat(k), v, g)[0],
            (shared_q, shared_k, v, by_head),
        ),
        "delta_rule, shared heads": (
            lambda q, k, v, beta, g: delta(q, k, v, beta, g)[0],
            lambda q, k, v, beta, g: delta(repeat(q), repeat(k), v, beta, g)[0],
            (shared_q, shared_k, v, beta, by_head),
        ),
        "exclusive": (
            lambda q, k, v, g: linear(q, k, v, g, exclusive=True, bonus=bonus)[0],
            delayed,
            (q, k, v, by_channel),
        ),
        "normalizer": (
            lambda q, k, v, g: linear(q, k, v, g, normalizer=True)[0][0],
            lambda q, k, v, g: linear(q, k, v, g)[0],
            (q, k, v, by_head),
        ),
        "value decays": (
            lambda q, k, v, g: linear(q, k, v, value_log_decay=g)[0],
            lambda q, k, v, g: linear(q, k, v, g)[0],
            (q, k, v, by_channel),
        ),
        "momentum_delta_rule": (
            lambda q, k, v, beta, g: momentum(q, k, v, beta, g, g)[0],
            lambda q, k, v, beta, g: delta(q, k, v, beta, g)[0],
            (q, k, v, beta, by_head),
        ),
    }


REFERENCES = {
    "linear_attention, shared heads": "repeated queries and keys",
    "delta_rule, shared heads": "repeated queries and keys",
    "exclusive": "keys, values and decays one step later",
    "normalizer": "no normalizer",
    "value decays": "decays of the keys",
    "momentum_delta_rule": "`delta_rule`",
}


def bench_options(rounds: int) -> None:
    """Time each option against its reference, in the default algorithm."""
    table = Table(f"Time over that of the reference, B={B}, T={T}, H={H}, K=V={K}, float32")
    for name, (run, reference, args) in _pairs().items():
        if not name.startswith(ONLY.value):
            continue
        row: dict[str, float | str] = {"reference": REFERENCES[name]}
        for suffix, wrap in (("forward", lambda run: run), ("with gradients", _with_gradients)):
            pair: Candidates = {
                key: functools.partial(jax.jit(wrap(function)), *args)
                for key, function in (("option", run), ("reference", reference))
            }
            row[suffix] = ratios(pair, "reference", rounds)["option"]
        table.row(name, row)
