"""Training steps on CPU with the allocator's defaults, and with memory that the process keeps.

The settings of an allocator belong to a process, so every measurement runs in a worker. A worker
returns the shortest processor time of a step; the table compares the minimum over rounds, each of
which starts one worker of each kind.
"""

import json
import pathlib
import resource
import tempfile
import time
from typing import Any

import jax
import optax

import seqjax
from experiments.base import allocator
from experiments.bench import tools
from seqjax.layers.registry import REGISTRY

LAYERS = ("lru", "gru", "gated_deltanet", "mamba")
STEPS = 10
DEFAULT = "default"
# Huge pages are an option of glibc that a process reads when it starts.
KINDS = {DEFAULT: {}, "kept": {}, "kept, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}


def bench_allocator(rounds: int) -> None:
    """Print the speed-up of training steps from each setting, and the page faults of a step."""
    table = tools.Table(
        "Training steps, 16 x 128 bytes, 2 blocks of width 128: processor time of the default over"
        " that of a setting"
    )
    for layer in LAYERS:
        if not layer.startswith(tools.ONLY.value):
            continue
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, env in KINDS.items():
                with tempfile.TemporaryDirectory() as folder:
                    request = [layer, kind != DEFAULT]
                    answer = tools.run_apart(__name__, request, pathlib.Path(folder), env)
                found[kind].append(json.loads(answer))
        best = {kind: min(run["seconds"] for run in runs) for kind, runs in found.items()}
        row: dict[str, float | str] = {k: best[DEFAULT] / best[k] for k in KINDS if k != DEFAULT}
        row |= {f"faults, {k}": str(int(runs[0]["faults"])) for k, runs in found.items()}
        table.row(layer, row)


def measure(layer: str, kept: bool) -> str:
    """Return the shortest processor time of a training step and its page faults, as JSON."""
    if kept and not allocator.keep_memory():
        raise RuntimeError("the settings need glibc and a CPU")
    entry = REGISTRY[layer]
    mixer = entry.make(128, **entry.defaults(128, 8))
    model = seqjax.models.LanguageModel(256, seqjax.models.Backbone(mixer, depth=2))
    transform = optax.adamw(1e-3)
    data = jax.random.randint(jax.random.key(1), (16, 129), 0, 256)

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply(params, data[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[:, 1:]).mean()

    def step(params: Any, state: Any) -> Any:
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    params = jax.jit(model.init)(jax.random.key(0))
    carry = run(params, transform.init(params))
    times = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        start = time.process_time()
        carry = jax.block_until_ready(run(*carry))
        times.append(time.process_time() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return json.dumps({"seconds": min(times), "faults": faults / STEPS})


if __name__ == "__main__":
    tools.answer(measure)
