"""Tokens per second of generation: in a loop on the device, and from Python token by token.

By default one layer of each family runs: the first that the registry lists for an op, and for a
module of layers without an op.
"""

import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import seqjax
from experiments.base.errors import UserError, nearest
from experiments.bench.tools import Table, cpu_seconds
from seqjax.layers import REGISTRY

LAYERS = flags.DEFINE_list(
    "layers",
    "",
    "Layers of suites generate and speculate, by their names in configurations; by default one of"
    " each family.",
)
VOCAB, DIM, DEPTH, HEADS = 256, 128, 2, 4
PROMPT, TOKENS = 128, 64
COLUMNS = [
    "decode, tokens/s",
    "Python loop, tokens/s",
    "decode / loop",
    "decode / loop of one program",
    "prefill, tokens/s",
    "prefill / decode",
]


def family(name: str) -> str:
    """Return the op of a registered layer, or its module if it has no op."""
    entry = REGISTRY[name]
    return entry.op or entry.layer.__module__.rpartition(".")[2]


def layer_names() -> list[str]:
    """Return the layers that `LAYERS` names, or the first one of each family."""
    for name in LAYERS.value:
        if name not in REGISTRY:
            raise UserError(f"--layers: unknown layer {name!r}: {nearest(name, REGISTRY)}")
    first: dict[str, str] = {}
    for name in REGISTRY:
        first.setdefault(family(name), name)
    return LAYERS.value or list(first.values())


@functools.cache
def make_model(name: str) -> tuple[Any, Any]:
    """Return a small language model with a registered layer, and its parameters."""
    entry = REGISTRY[name]
    layer = entry.make(DIM, **entry.defaults(DIM, HEADS))
    model = seqjax.models.LanguageModel(VOCAB, seqjax.models.Backbone(layer, depth=DEPTH))
    return model, jax.jit(model.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _step(model: Any, params: Any, token: Any, state: Any) -> Any:
    return model.step(params, token, state)


_draw = jax.jit(jax.random.categorical)


@functools.partial(jax.jit, static_argnums=0)
def _step_and_draw(model: Any, params: Any, token: Any, state: Any, key: Any, index: Any) -> Any:
    logits, state = model.step(params, token, state)
    return jax.random.categorical(jax.random.fold_in(key, index), logits), state


def loop(model: Any, params: Any, state: Any, batch: int) -> Any:
    """Generate `TOKENS` tokens as many scripts do: a step, a key and a draw for each token."""
    token, key = jnp.zeros(batch, jnp.int32), jax.random.key(0)
    for index in range(TOKENS):
        logits, state = _step(model, params, token, state)
        token = _draw(jax.random.fold_in(key, index), logits)
        np.asarray(token)  # shown to the user
    return token


def fused_loop(model: Any, params: Any, state: Any, batch: int) -> Any:
    """Generate `TOKENS` tokens with one program for each token."""
    token, key = jnp.zeros(batch, jnp.int32), jax.random.key(0)
    for index in range(TOKENS):
        token, state = _step_and_draw(model, params, token, state, key, index)
        np.asarray(token)
    return token


def rates(name: str, batch: int, rounds: int) -> dict[str, float | str]:
    """Return tokens per second of each way, and their ratios, from the least times of all rounds.

    On CPU they are seconds of processor time.
    """
    model, params = make_model(name)
    prompt = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, VOCAB)
    state = model.initial_state(batch)
    # Reading a prompt of one token is one step, so that all ways take `TOKENS` steps.
    runs = {
        "decode": lambda: seqjax.generate(
            model, params, prompt[:, :1], max_new_tokens=TOKENS, key=jax.random.key(2)
        ),
        "loop": lambda: loop(model, params, state, batch),
        "fused": lambda: fused_loop(model, params, state, batch),
        "prefill": lambda: seqjax.prefill(model, params, prompt),
    }
    on_cpu = jax.default_backend() == "cpu"
    times = cpu_seconds(runs, rounds, time.process_time if on_cpu else time.perf_counter)
    decode, prefill = batch * TOKENS / times["decode"], batch * PROMPT / times["prefill"]
    return {
        COLUMNS[0]: f"{decode:,.0f}",
        COLUMNS[1]: f"{batch * TOKENS / times['loop']:,.0f}",
        COLUMNS[2]: times["loop"] / times["decode"],
        COLUMNS[3]: times["fused"] / times["decode"],
        COLUMNS[4]: f"{prefill:,.0f}",
        COLUMNS[5]: prefill / decode,
    }


def bench_generate(rounds: int) -> None:
    """Print tokens per second of a layer of each family for batches of 1 and 64."""
    table = Table(
        f"Generation: {DEPTH} blocks of width {DIM}, prompts of {PROMPT}, {TOKENS} tokens", COLUMNS
    )
    for name, batch in itertools.product(layer_names(), (1, 64)):
        table.row(f"{family(name)}: {name}, B={batch}", rates(name, batch, rounds))
