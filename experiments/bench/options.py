"""Times of ops and of their options over the times of what they replace or reduce to.

Both run in the same rounds. Times are processor times, which depend less on other programs. The
goal is at most 1.3 for ops that reduce to their reference.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import seqjax
from experiments.bench import cases
from experiments.bench.tools import ONLY, Candidates, Table, cpu_seconds

B, T, H, K = 2, 1024, 8, 64
D, N, SMALL = H * K, 16, 8  # channels, states of a channel, size of a block
Run = Callable[..., jax.Array]
Pairs = dict[str, tuple[Run, Run, tuple[jax.Array, ...]]]


def _normals() -> Callable[..., jax.Array]:
    """Return a function that draws arrays [B, T, ...]."""
    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(0), 16))
    return lambda *shape: jax.random.normal(next(keys), (B, T, *shape))


def _elementwise_pairs() -> Pairs:
    """Return by name an op, what it reduces to, and the arguments of both."""
    normal = _normals()
    x, d = normal(D), -jax.nn.softplus(normal(D))
    u, A, B_in, C = cases.arrays("ssm_scan", B, T)
    blocks, by_block = normal(D // SMALL, SMALL, SMALL) * SMALL**-0.5 / 2, normal(D // SMALL, SMALL)
    selective = (normal(D), jax.nn.sigmoid(normal(D)), -jnp.ones((D, N)), normal(N) / N, normal(N))

    def maximum(d: jax.Array, x: jax.Array) -> jax.Array:
        def combine(a: Any, b: Any) -> Any:
            return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

        return seqjax.monoid_scan(combine, (d, x))[0][1]

    def logsumexp(d: jax.Array, x: jax.Array) -> jax.Array:
        m = lax.stop_gradient(seqjax.log_scan(d, x, semiring="max")[0])
        before = jnp.pad(m[:, :-1], [(0, 0), (1, 0), (0, 0)], constant_values=-jnp.inf)
        return m + jnp.log(seqjax.linear_scan(jnp.exp(before + d - m), jnp.exp(x - m))[0])

    def states(u: jax.Array, A: jax.Array, B_in: jax.Array, C: jax.Array) -> jax.Array:
        inputs = (u[..., None] * B_in).reshape(B, T, -1)
        h = seqjax.linear_scan(jnp.exp(A).reshape(-1), inputs)[0].reshape(*u.shape, -1)
        return jnp.sum(C * h, axis=-1).real

    def affine(A: jax.Array, x: jax.Array) -> jax.Array:
        def combine(a: Any, b: Any) -> Any:
            return b[0] @ a[0], jnp.einsum("gij,gj->gi", b[0], a[1]) + b[1]

        return seqjax.monoid_scan(combine, (A, x))[0][1]

    def step(rate: jax.Array, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(state @ rate + x)
        return state, state

    def by_lax_scan(rate: jax.Array, x: jax.Array) -> jax.Array:
        first = jnp.zeros_like(x[:, 0])
        ys = lax.scan(functools.partial(step, rate), first, jnp.moveaxis(x, 1, 0))[1]
        return jnp.moveaxis(ys, 0, 1)

    def run_steps(rate: jax.Array, x: jax.Array) -> jax.Array:
        return seqjax.step_scan(step, rate, x, jnp.zeros_like(x[:, 0]))[0]

    def selected(decay: Any) -> Run:
        return lambda x, dt, A, B_in, C: seqjax.selective_scan(
            x, dt, None if decay == "online" else A, B_in, C, decay=decay
        )[0]

    return {
        "log_scan, max": (lambda d, x: seqjax.log_scan(d, x, semiring="max")[0], maximum, (d, x)),
        "log_scan, log": (lambda d, x: seqjax.log_scan(d, x)[0], logsumexp, (d, x)),
        "ssm_scan": (cases.by(None, "ssm_scan"), states, (u, A, B_in, C)),
        "block_scan": (cases.by(None, "block_scan"), affine, (blocks, by_block)),
        "block_scan, constant": (
            cases.by(None, "block_scan"),
            lambda A, x: seqjax.block_scan(jnp.broadcast_to(A, (B, T, *A.shape)), x)[0],
            (blocks[0, 0], by_block),
        ),
        "step_scan": (run_steps, by_lax_scan, (jnp.eye(K) / 2, normal(K))),
        "selective_scan, signed": (selected("signed"), selected("exp"), selective),
        "selective_scan, online": (selected("online"), selected("exp"), selective),
    }


def _matrix_pairs() -> Pairs:
    """Return by name the op with an option, the reference, and the arguments of both."""
    normal = _normals()

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
        "generalized_delta_rule": (
            lambda q, k, v, beta, g: seqjax.generalized_delta_rule(
                q, beta[..., None] * k, v, k, -beta[..., None] * k, g
            )[0],
            lambda q, k, v, beta, g: delta(q, k, v, beta, g)[0],
            (q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, beta, by_channel),
        ),
    }


REFERENCES = {
    "log_scan, max": "`monoid_scan` of (decay, maximum)",
    "log_scan, log": "`log_scan` of the maximum and `linear_scan`",
    "ssm_scan": "`linear_scan` of all states",
    "block_scan": "`monoid_scan` of affine maps",
    "block_scan, constant": "`block_scan` with a matrix for each step",
    "step_scan": "`lax.scan`",
    "selective_scan, signed": 'decay="exp"',
    "selective_scan, online": 'decay="exp"',
    "linear_attention, shared heads": "repeated queries and keys",
    "delta_rule, shared heads": "repeated queries and keys",
    "exclusive": "keys, values and decays one step later",
    "normalizer": "no normalizer",
    "value decays": "decays of the keys",
    "momentum_delta_rule": "`delta_rule`",
    "generalized_delta_rule": "`delta_rule`",
}


def bench_options(rounds: int) -> None:
    """Time each op or option against its reference, in the default algorithm."""
    title = "Processor time over that of the reference"
    table = Table(f"{title}, B={B}, T={T}, H={H}, K=V={K}, D={D}, N={N}, float32")
    for name, (run, reference, args) in (_elementwise_pairs() | _matrix_pairs()).items():
        if not name.startswith(ONLY.value):
            continue
        row: dict[str, float | str] = {"reference": REFERENCES[name]}
        for suffix, wrap in (
            ("forward", lambda run: run),
            ("with gradients", cases.with_gradients),
        ):
            pair: Candidates = {
                key: functools.partial(jax.jit(wrap(function)), *args)
                for key, function in (("option", run), ("reference", reference))
            }
            times = cpu_seconds(pair, rounds)
            row[suffix] = times["option"] / times["reference"]
        table.row(name, row)
