"""Shared parts of the configurations: layers, their options, and the words after the colon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.base.errors import UserError, nearest
from seqjax.layers import REGISTRY

# Word -> `model.mixers`; several layers, separated by commas, alternate.
MIXERS = {name: name for name in REGISTRY} | {"hybrid": "gated_deltanet,attention"}


# Switch of all configurations that have a small version for tests.
QUICKTEST = {"quicktest": "a run of a few seconds that learns almost nothing"}


def layers(default: str) -> tuple[str, ...]:
    """Return the words for layers, without repetition, the default first."""
    return tuple(dict.fromkeys([default, *MIXERS]))


def parse(
    arg: str, kinds: Mapping[str, Sequence[str]], switches: Iterable[str] = ()
) -> tuple[dict[str, str], set[str]]:
    """Parse `--config=FILE:WORD,WORD` into one word of each kind and a set of switches.

    Args:
      arg: the text after the colon.
      kinds: the words of each kind; the first one is the default.
      switches: words that belong to no kind.
    """
    switches = tuple(switches)
    known = [word for words in kinds.values() for word in words] + list(switches)
    words = [word.strip() for word in arg.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UserError(f"unknown word {word!r}: {nearest(word, known)}")
    chosen = {}
    for kind, choices in kinds.items():
        named = [word for word in words if word in choices]
        if len(named) > 1:
            hint = ", and set others with --config.model.mixers=lru,attention"
            raise UserError(
                f"the configuration names the {kind}s {' and '.join(named)}: give one"
                + (hint if kind == "layer" else "")
            )
        chosen[kind] = named[0] if named else choices[0]
    return chosen, set(words) & set(switches)


def layer_options(dim: int, heads: int) -> dict[str, dict[str, Any]]:
    """Return the default options of every layer for blocks of width `dim`."""
    return {name: entry.defaults(dim, heads) for name, entry in REGISTRY.items()}


def settings(name: str, layer: str, *, dim: int, depth: int, heads: int) -> dict[str, Any]:
    """Return the fields that all configurations have."""
    return {
        "name": name,
        "seed": 0,
        "mesh": "",
        "mesh_axis_types": "auto",  # or "explicit", the default of jax.make_mesh
        "steps": 500,
        "stop_at": 0.0,  # stop once a mid-run evaluation reaches this; 0 disables
        "log_every": 20,
        "eval_every": 100,
        "save_every": 100,
        "keep": 2,
        "model": {
            "mixers": MIXERS[layer],
            "depth": depth,
            "dim": dim,
            "mlp_ratio": 2.0,
            "dtype": "float32",
            "remat": False,
            "scan": False,
            "options": layer_options(dim, heads),
        },
        "optimizer": {
            "learning_rate": 4e-3,
            "final_fraction": 0.05,
            "warmup_steps": 50,
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "recurrence_rate": 0.25,
        },
    }


def small(layer: str) -> dict[str, Any]:
    """Return the fields that reduce any configuration to a run of a few seconds."""
    options = layer_options(16, 2)
    options["s5"]["blocks"] = 2
    options["mamba"]["state_dim"] = 4
    options["attention"]["window"] = 8
    for chosen in options.values():
        chosen.pop("negative_eigenvalues", None)
    return {
        "steps": 10,
        "log_every": 2,
        "eval_every": 5,
        "save_every": 5,
        "model": {"depth": len(MIXERS[layer].split(",")), "dim": 16, "options": options},
        "optimizer": {"warmup_steps": 2},
    }
