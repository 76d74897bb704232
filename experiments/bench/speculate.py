"""Two ways to get a recurrent state back to the last accepted token of speculative decoding."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.generate import VOCAB, family, layer_names, make_model
from experiments.bench.tools import Table, ratios
from seqjax.generation import speculation

PROPOSED = 4


def rollbacks(name: str, batch: int) -> dict[str, Any]:
    """Return functions that verify a round and return the logits and the state, by way."""
    model, params = make_model(name)
    shape = batch, PROPOSED + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB)
    state = model.initial_state(batch)
    # Some rows accept few tokens, others all of them, as in a batch of real texts.
    accepted = 1 + jnp.arange(batch, dtype=jnp.int32) % PROPOSED

    def again(params: Any, tokens: jax.Array, state: Any, accepted: jax.Array) -> Any:
        logits, whole = model.apply(params, tokens, state)
        return logits, speculation.state_after(model, params, tokens, state, whole, accepted)

    def stored(params: Any, tokens: jax.Array, state: Any, accepted: jax.Array) -> Any:
        def one(state: Any, token: jax.Array) -> Any:
            logits, state = model.step(params, token, state)
            return state, (logits, state)

        _, (logits, states) = jax.lax.scan(one, state, tokens.T)
        return jnp.moveaxis(logits, 0, 1), speculation.stored_state(states, state, accepted)

    def call(way: Any) -> Any:
        run = jax.jit(way)
        return lambda: run(params, tokens, state, accepted)

    return {"computed again": call(again), "stored": call(stored)}


def bench_speculate(rounds: int) -> None:
    """Print the time of a round with stored states over that with a second pass."""
    table = Table(
        f"A round of {PROPOSED} proposals: time over that of a parallel pass and a second pass for"
        " the state"
    )
    for name, batch in itertools.product(layer_names(), (1, 64)):
        times = ratios(rollbacks(name, batch), "computed again", rounds)
        table.row(
            f"{family(name)}: {name}, B={batch}", {"states of every step stored": times["stored"]}
        )
