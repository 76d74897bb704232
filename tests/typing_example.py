"""A user's program: `tests/test_typing.py` runs it, and mypy and pyright check it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax import sharding
from seqjax.cells import Cell
from seqjax.layers import LRU, Context, GatedMLP, Layer, Param, SlidingWindowAttention
from seqjax.models import Backbone, Block, Classifier, LanguageModel
from seqjax.types import Array, Float, PyTree, Reset

Params: TypeAlias = dict[str, PyTree]


def batches(count: int) -> Iterator[jax.Array]:
    """Yield tokens [B, T + 1]."""
    for key in jax.random.split(jax.random.key(0), count):
        yield jax.random.randint(key, (2, 9), 0, 16)


def train(model: LanguageModel, steps: int = 2) -> tuple[Params, list[float]]:
    """Train with optax; return the parameters and the losses."""
    params = model.init(jax.random.key(0))
    is_weight = jax.tree.map(lambda role: role == "weight", model.param_roles())
    optimizer = optax.adamw(1e-3, mask=is_weight)

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits, _ = model.apply(params, tokens[:, :-1])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(errors)

    @jax.jit
    def update(
        params: PyTree, state: optax.OptState, tokens: jax.Array
    ) -> tuple[PyTree, optax.OptState, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, value

    state = optimizer.init(params)
    losses: list[float] = []
    for tokens in batches(steps):
        params, state, value = update(params, state, tokens)
        losses.append(float(value))
    return params, losses


def sample(model: LanguageModel, params: Params, tokens: jax.Array, count: int) -> jax.Array:
    """Continue tokens [B, T] by `count` greedy ones: [B, count]."""
    logits, state = model.apply(params, tokens)
    token, found = jnp.argmax(logits[:, -1], -1), []
    for _ in range(count):
        found.append(token)
        next_logits, state = model.step(params, token, state)
        token = jnp.argmax(next_logits, -1)
    return jnp.stack(found, 1)


def ops(x: Float[Array, "B T D"], reset: Reset | None = None) -> list[jax.Array]:
    """Call every op; return the final states."""
    B, T, D = x.shape
    heads, beta, gate = x[:, :, None], jnp.ones((B, T, 1)), -jnp.ones((B, T, 1))
    scanned, last = seqjax.linear_scan(jnp.full(D, 0.9), x, reset=reset, algorithm="sequential")
    _, last = seqjax.linear_scan(jnp.full(D, 0.9), scanned, last, chunk_size=None, reverse=True)
    A, drive = -jnp.ones((D, 4)), x[:, :, :4]
    _, selective = seqjax.selective_scan(x, jnp.ones_like(x), A, drive, drive, None, reset=reset)
    _, attended = seqjax.linear_attention(heads, heads, heads, None, scale=1.0)
    _, written = seqjax.delta_rule(heads, heads, heads, beta, gate, None, reset=reset)
    _, general = seqjax.generalized_delta_rule(heads, heads, heads, heads, heads, gate)
    _, largest = seqjax.monoid_scan(jnp.maximum, x)
    cell = Leaky(dim=D)
    solver = seqjax.Newton(tol=None)
    hs, h, info = seqjax.nonlinear_scan(
        cell, {"w": jnp.ones(D)}, x[:, :, None], cell.initial_state(B), solver=solver
    )
    exponent = seqjax.lyapunov(cell, {"w": jnp.ones(D)}, x[:, :, None], hs)
    return [last, selective, attended, written, general, largest, h, exponent, info.iterations]


@dataclasses.dataclass(frozen=True)
class Leaky(Cell):
    """User-defined cell."""

    dim: int
    gates = 1
    structure = "diagonal"
    recurrent = {"w": "vector"}  # noqa: RUF012

    def __call__(self, params: Mapping[str, jax.Array], h: jax.Array, u: jax.Array) -> jax.Array:
        return 0.9 * h + 0.1 * jnp.tanh(params["w"] * h + u[0])


@dataclasses.dataclass(frozen=True)
class Average(Layer):
    """User-defined layer: a moving average with a learned decay per channel."""

    dim: int
    start: float | None = None

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {"logit": Param((self.dim,), ("embed",), "recurrence", self._logit)}

    def _logit(self, key: jax.Array, shape: tuple[int, ...], dtype: PyTree) -> jax.Array:
        return jnp.full(shape, 2.0 if self.start is None else self.start, dtype)

    def make_state(self, batch_size: int, dtype: PyTree) -> jax.Array:
        return jnp.zeros((batch_size, self.dim), dtype)

    def forward(
        self, params: Params, x: jax.Array, state: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        decay = jax.nn.sigmoid(params["logit"])
        return seqjax.linear_scan(
            decay,
            (1 - decay) * x,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )


class Tagger(nnx.Module):
    """An NNX model around a recurrence."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.mixer = seqjax.nnx.Recurrent(Average(dim=8), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y, _ = self.mixer(x)
        return self.head(y)


class Stack(linen.Module):
    """A Linen model around a recurrence."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, _ = seqjax.linen.Recurrent(Average(dim=8), param_dtype=jnp.float32)(x)
        return linen.Dense(3)(y)


def main() -> dict[str, tuple[int, ...]]:
    """Run everything once; return shapes by name."""
    mixers: list[Layer] = [LRU(dim=8), SlidingWindowAttention(8, 2, window=4)]
    model = LanguageModel(16, Backbone(mixers, depth=2, mlp_ratio=1.0), dtype="float32")
    wider = dataclasses.replace(model, vocab_size=32)
    params, losses = train(model)
    tokens = next(batches(1))
    averaged = optax.incremental_update(params, params, 0.5)  # optax's own type of parameters
    logits, _ = model.apply(averaged, tokens)
    starts = seqjax.segment_starts(jnp.zeros((2, 5), jnp.int32))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    finals = ops(x, starts)

    block = Block(Average(8), mlp=None)
    y, _ = block.apply(block.init(jax.random.key(0)), x, reset=starts)
    mlp = GatedMLP(dim=8)
    y, _ = mlp.apply(mlp.init(jax.random.key(0), jnp.bfloat16), y)
    classifier = Classifier(3, Backbone(Average(8)), input_dim=8)
    scores, _ = classifier.apply(classifier.init(jax.random.key(0)), y, state=None, mask=None)

    tagger = Tagger(nnx.Rngs(0))
    tags, stack = tagger(x), Stack()
    variables = stack.init(jax.random.key(0), x)
    stacked = stack.apply(variables, x)
    assert isinstance(stacked, jax.Array)

    mesh = sharding.make_mesh({"fsdp": 1}, devices=jax.devices()[:1])
    plan = sharding.shard(model, mesh, batch_shape=None)
    placed = jax.device_put(params, plan.params)
    found = sample(sharding.constrain_activations(model, None), placed, tokens, 3)
    return {
        "losses": (len(losses),),
        "logits": logits.shape,
        "sample": found.shape,
        "finals": (len(finals),),
        "scores": scores.shape,
        "tags": tags.shape,
        "stacked": stacked.shape,
        "wider": (wider.vocab_size,),
    }
