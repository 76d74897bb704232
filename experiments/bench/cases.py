"""Benchmark cases: inputs, the library's ops, and references written with `lax.scan`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import seqjax

H, K, D, N = 4, 64, 512, 16  # V equals K; `arrays` can override both
SMALL = 8  # the size of a block of `block_scan`
MATRIX = ("sequential", "chunked", "associative")
ALGORITHMS = {
    "block_scan": MATRIX,
    "block_scan, constant": MATRIX,
    "ssm_scan": ("sequential", "chunked"),
    "linear_attention": MATRIX,
    "linear_attention, scalar": MATRIX,
    "linear_attention, channel": MATRIX,
    "delta_rule": MATRIX,
    "delta_rule, scalar": MATRIX,
    "delta_rule, channel": MATRIX,
    "generalized_delta_rule": MATRIX,
    "selective_scan": ("sequential", "chunked"),
}
NAMES = tuple(ALGORITHMS)
WIDTHLESS = ("block_scan", "block_scan, constant", "ssm_scan", "selective_scan")
Run = Callable[..., jax.Array]


def arrays(name: str, batch: int, length: int, width: int = K) -> tuple[jax.Array, ...]:
    """Return random inputs of the op, in the order of its arguments; `width` is K and V."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), (batch, length, *shape))

    def unit(*shape: int) -> jax.Array:
        x = normal(*shape)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    if name == "selective_scan":
        A = -jnp.exp(jax.random.normal(next(keys), (D, N)))
        return normal(D), jax.nn.softplus(normal(D)), A, normal(N), normal(N)
    if name == "ssm_scan":
        rate, phase, B, C = jax.random.normal(next(keys), (4, D, N))
        A = jax.lax.complex(-jnp.exp(rate), phase)
        return normal(D), A, jax.lax.complex(B, C), jax.lax.complex(C, B)
    if name.startswith("block_scan"):
        blocks = D // SMALL, SMALL, SMALL
        lead = () if name.endswith("constant") else (batch, length)
        A = jax.random.normal(next(keys), (*lead, *blocks)) * SMALL**-0.5 / 2
        return A, normal(D // SMALL, SMALL)
    made = [normal(H, width), unit(H, width), normal(H, width)]
    if name.startswith("delta_rule"):
        made.append(jax.nn.sigmoid(normal(H)))
    if name == "generalized_delta_rule":
        direction = unit(H, width)
        made += [direction, -direction * jax.nn.sigmoid(normal(H, width))]
    if name.endswith("scalar"):
        made.append(-jax.nn.softplus(normal(H)))
    if name.endswith("channel") or name == "generalized_delta_rule":
        made.append(-jax.nn.softplus(normal(H, width)))
    return tuple(made)


def by(algorithm: str | None, name: str, **keywords: Any) -> Run:
    """Return the library's op with an algorithm; the function returns outputs only."""
    op = getattr(seqjax, name.split(",")[0])
    return lambda *args: op(*args, algorithm=algorithm, **keywords)[0]


def plain(name: str) -> Run:
    """Return the recurrence as a plain `lax.scan`, without rematerialization."""
    if name == "ssm_scan":
        return _ssm
    if name.startswith("block_scan"):
        return _blocks
    step = _selective if name == "selective_scan" else functools.partial(_matrix, name)

    def run(*args: jax.Array) -> jax.Array:
        shared, timed = ([args[2]], [*args[:2], *args[3:]]) if step is _selective else ([], args)
        batch = args[0].shape[0]
        width = args[0].shape[-1]
        state = jnp.zeros((batch, D, N) if step is _selective else (batch, H, width, width))
        xs = tuple(jnp.moveaxis(x, 1, 0) for x in timed)
        _, ys = lax.scan(lambda state, x: step(state, *shared, *x), state, xs)
        return jnp.moveaxis(ys, 0, 1)

    return run


def _ssm(u: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(A) * h + B * u[..., None]
        return h, jnp.sum(C * h, axis=-1).real

    state = jnp.zeros((u.shape[0], *A.shape), A.dtype)
    return jnp.moveaxis(lax.scan(step, state, jnp.moveaxis(u, 1, 0))[1], 0, 1)


def _blocks(A: jax.Array, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = jnp.einsum("...ij,...j->...i", inputs[0], h) + inputs[1]
        return h, h

    length = x.shape[1]
    A = jnp.broadcast_to(A, (length, *A.shape)) if A.ndim == 3 else jnp.moveaxis(A, 1, 0)
    return jnp.moveaxis(lax.scan(step, x[:, 0] * 0, (A, jnp.moveaxis(x, 1, 0)))[1], 0, 1)


def _selective(h: jax.Array, A: jax.Array, *x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_t, dt, B, C = x
    h = jnp.exp(dt[..., None] * A) * h + (dt * x_t)[..., None] * B[:, None, :]
    return h, jnp.einsum("bdn,bn->bd", h, C)


def _matrix(name: str, S: jax.Array, *x: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k, v, *rest = x
    found = jnp.einsum("bhkv,bhk->bhv", S, rest[0]) if name == "generalized_delta_rule" else None
    if name.endswith(("scalar", "channel")) or found is not None:
        g = rest[-1]
        S = jnp.exp(g if g.ndim == 3 else g[..., None])[..., None] * S
    if name.startswith("delta_rule"):
        v = rest[0][..., None] * (v - jnp.einsum("bhkv,bhk->bhv", S, k))
    S = S + jnp.einsum("bhk,bhv->bhkv", k, v)
    if found is not None:
        S = S + jnp.einsum("bhk,bhv->bhkv", rest[1], found)
    return S, jnp.einsum("bhkv,bhk->bhv", S, q) * q.shape[-1] ** -0.5


def with_gradients(run: Run) -> Callable[..., Any]:
    """Return a function for the outputs of `run` and the gradients of all arguments."""

    def both(*args: jax.Array) -> Any:
        y, pull = jax.vjp(run, *args)
        return y, pull(y)

    return both
