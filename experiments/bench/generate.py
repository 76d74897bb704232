"""Tokens per second of generation: in a loop on the device, and from Python token by token."""

import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import seqjax
from experiments.bench.tools import Table, seconds
from seqjax.layers import REGISTRY

LAYERS = flags.DEFINE_list(
    "layers",
    "lru,mamba,mamba2,gla,gated_deltanet,rwkv7,mlstm,gru,attention",
    "Layers of suite generate, by their names in configurations.",
)
VOCAB, DIM, DEPTH, HEADS = 256, 128, 2, 4
PROMPT, TOKENS = 128, 64
LOOP = "Python loop, tokens/s"
COLUMNS = ["decode, tokens/s", LOOP, "decode / loop", "prefill, tokens/s", "prefill / decode"]


def make_model(name: str) -> tuple[Any, Any]:
    """Return a small language model with a registered layer, and its parameters."""
    entry = REGISTRY[name]
    layer = entry.make(DIM, **entry.defaults(DIM, HEADS))
    model = seqjax.models.LanguageModel(VOCAB, seqjax.models.Backbone(layer, depth=DEPTH))
    return model, jax.jit(model.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _step(model: Any, params: Any, token: Any, state: Any, key: Any) -> Any:
    logits, state = model.step(params, token, state)
    return jax.random.categorical(key, logits), state


def loop(model: Any, params: Any, state: Any, batch: int) -> Any:
    """Generate `TOKENS` tokens with one call of the device each."""
    token, key = jnp.zeros(batch, jnp.int32), jax.random.key(0)
    for index in range(TOKENS):
        token, state = _step(model, params, token, state, jax.random.fold_in(key, index))
        np.asarray(token)  # shown to the user
    return token


def rates(name: str, batch: int, rounds: int) -> dict[str, float | str]:
    """Return tokens per second of each way, and their ratios, in medians over the rounds."""
    model, params = make_model(name)
    prompt = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, VOCAB)
    state = model.initial_state(batch)
    options: dict[str, Any] = {"key": jax.random.key(2)}
    runs = {
        "one": lambda: seqjax.generate(model, params, prompt, max_new_tokens=1, **options),
        "many": lambda: seqjax.generate(
            model, params, prompt, max_new_tokens=1 + TOKENS, **options
        ),
        "loop": lambda: loop(model, params, state, batch),
        "prefill": lambda: seqjax.prefill(model, params, prompt),
    }
    for run in runs.values():
        jax.block_until_ready(run())  # compile
    times = [{key: seconds(run) for key, run in runs.items()} for _ in range(rounds)]

    def median(value: Any) -> float:
        return statistics.median(map(value, times))

    decode = median(lambda t: batch * TOKENS / max(t["many"] - t["one"], 1e-9))
    by_loop = median(lambda t: batch * TOKENS / t["loop"])
    prefill = median(lambda t: batch * PROMPT / t["prefill"])
    return {
        COLUMNS[0]: f"{decode:,.0f}",
        COLUMNS[1]: f"{by_loop:,.0f}",
        COLUMNS[2]: median(lambda t: t["loop"] / max(t["many"] - t["one"], 1e-9)),
        COLUMNS[3]: f"{prefill:,.0f}",
        COLUMNS[4]: prefill / decode,
    }


def bench_generate(rounds: int) -> None:
    """Print tokens per second of every layer for batches of 1 and 64."""
    table = Table(
        f"Generation: {DEPTH} blocks of width {DIM}, prompts of {PROMPT}, {TOKENS} tokens", COLUMNS
    )
    for name, batch in itertools.product(LAYERS.value, (1, 64)):
        table.row(f"{name}, B={batch}", rates(name, batch, rounds))
