"""Time of the same layer in other libraries over the time of this one, in one process.

A row is a function that returns one candidate per library, each a function without arguments that
computes outputs, and a second set that also computes gradients. Libraries that are not installed
are left out. To add a row, write such a function and add it to `ROWS`.

Peers get the same work: the layers of seqjax project their output, so an output projection follows
each peer's recurrence. Other programs on the machine only ever add time, so the table compares the
minimum over rounds. A round times every candidate once. On a machine with much other load, pin the
process to one core, set OMP_NUM_THREADS=1, and pass `--processor_time`.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import cases
from experiments.bench.tools import (
    ONLY,
    PROCESSOR_TIME,
    Candidates,
    Table,
    cpu_seconds,
    seconds,
)
from seqjax import layers

US = "seqjax"
SIZES = ((1, 128, 64), (16, 256, 128), (1, 2048, 256), (16, 2048, 512))  # B, T, D


class Row(NamedTuple):
    """The candidates of a row, by library: outputs only, and outputs with all gradients."""

    forward: Candidates
    both: Candidates


def installed(name: str) -> ModuleType | None:
    """Return a module, or None if its library is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def jax_candidates(run: Callable[..., jax.Array], *arrays: Any) -> tuple[Any, Any]:
    """Return the jitted forward pass and the jitted pass with gradients of a JAX function."""
    both = cases.with_gradients(run)
    return functools.partial(jax.jit(run), *arrays), functools.partial(jax.jit(both), *arrays)


def torch_candidates(torch: Any, run: Any, x: jax.Array) -> tuple[Any, Any]:
    """Return the forward pass and the pass with gradients of a `torch.nn.Module`."""
    given = torch.from_numpy(np.array(x))
    moving = given.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            run(given)

    def both() -> None:
        y = run(moving)
        torch.autograd.grad(y, [moving, *run.parameters()], y.detach())

    return forward, both


def rnn_row(name: str, batch: int, length: int, dim: int) -> Row:
    """Return GRU or LSTM with an output projection, over inputs [B, T, D]."""
    x = jax.random.normal(jax.random.key(0), (batch, length, dim))
    layer = getattr(layers, name)(dim)
    found = {
        US: jax_candidates(
            lambda params, x: layer.apply(params, x)[0], layer.init(jax.random.key(1)), x
        )
    }
    if linen := installed("flax.linen"):
        cell = {"GRU": linen.GRUCell, "LSTM": linen.OptimizedLSTMCell}[name](dim)
        model = linen.Sequential([linen.RNN(cell), linen.Dense(dim, use_bias=False)])
        found["flax"] = jax_candidates(model.apply, model.init(jax.random.key(1), x), x)
    if torch := installed("torch"):
        found["torch"] = torch_candidates(torch, _torch_rnn(torch, name, dim), x)
    return _row(found)


def _torch_rnn(torch: Any, name: str, dim: int) -> Any:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(torch.nn, name)(dim, dim, batch_first=True)
            self.out = torch.nn.Linear(dim, dim, bias=False)

        def forward(self, x: Any) -> Any:
            return self.out(self.rnn(x)[0])

    return Model()


def mamba_row(batch: int, length: int, dim: int) -> Row:
    """Return Mamba over inputs [B, T, D], and the plain PyTorch form of transformers."""
    x = jax.random.normal(jax.random.key(0), (batch, length, dim))
    layer = layers.Mamba(dim)
    ours = jax_candidates(
        lambda params, x: layer.apply(params, x)[0], layer.init(jax.random.key(1)), x
    )
    found = {US: ours}
    torch = installed("torch")
    if torch and (theirs := installed("transformers.models.mamba.modeling_mamba")):
        config = theirs.MambaConfig(hidden_size=dim, state_size=layer.state_dim)
        found["transformers"] = torch_candidates(torch, theirs.MambaMixer(config, 0).eval(), x)
    return _row(found)


def delta_rule_row(batch: int, length: int) -> Row:
    """Return the gated delta rule, and the chunked plain PyTorch form of transformers."""
    arrays = cases.arrays("delta_rule, scalar", batch, length)
    found = {US: jax_candidates(cases.by(None, "delta_rule, scalar"), *arrays)}
    torch = installed("torch")
    if torch and (theirs := installed("transformers.models.qwen3_next.modeling_qwen3_next")):
        q, k, v, beta, g = (torch.from_numpy(np.array(x)).requires_grad_() for x in arrays)

        def run() -> Any:
            return theirs.torch_chunk_gated_delta_rule(q, k, v, g, beta)[0]

        def forward() -> None:
            with torch.no_grad():
                run()

        def both() -> None:
            y = run()
            torch.autograd.grad(y, [q, k, v, beta, g], y.detach())

        found["transformers"] = forward, both
    return _row(found)


def _row(found: dict[str, tuple[Any, Any]]) -> Row:
    return Row(*({key: pair[i] for key, pair in found.items()} for i in range(2)))


ROWS: dict[str, Callable[[], Row]] = {
    f"{name}, {list(size)}": functools.partial(rnn_row, name, *size)
    for name in ("GRU", "LSTM")
    for size in SIZES
}
ROWS |= {f"Mamba, {[*size]}": functools.partial(mamba_row, *size) for size in SIZES[1:3]}
ROWS |= {
    f"delta_rule, decay per head, B={batch}, T=2048": functools.partial(delta_rule_row, batch, 2048)
    for batch in (1, 4)
}


def minima(candidates: Candidates, rounds: int) -> dict[str, float]:
    """Return the shortest seconds of a call of each candidate; a round calls each one once."""
    if PROCESSOR_TIME.value:
        return cpu_seconds(candidates, rounds)
    for run in candidates.values():
        jax.block_until_ready(run())  # compile
    times = [{name: seconds(run) for name, run in candidates.items()} for _ in range(rounds)]
    return {name: min(found[name] for found in times) for name in candidates}


def columns(row: Row, rounds: int) -> Iterator[tuple[str, float]]:
    """Yield milliseconds of this library and ratios of the others."""
    for suffix, candidates in (("", row.forward), (", with gradients", row.both)):
        times = minima(candidates, rounds)
        yield f"{US} ms{suffix}", 1e3 * times[US]
        for name in candidates:
            if name != US:
                yield f"{name}{suffix}", times[name] / times[US]


def bench_peers(rounds: int) -> None:
    """Time the layers of other libraries against those of seqjax."""
    table = Table(f"Layers, float32: shortest time of a peer's call over that of {US}")
    for label, make in ROWS.items():
        if label.startswith(ONLY.value):
            table.row(label, dict(columns(make(), rounds)))
            jax.clear_caches()
