"""`dataclasses.replace` of a layer or model equals direct construction."""

import dataclasses

import pytest

import seqjax
from tests.contract.harness import ROWS

OTHER = {int: lambda n: n + 1, float: lambda x: x * 0.75 + 0.2, bool: lambda flag: not flag}
NONE = {  # other values of fields that are None
    "activation": "silu",
    "algorithm": "sequential",
    "bidirectional": True,
    "depth": 4,
    "dt_rank": 3,
    "head_dim": 6,
    "hidden_dim": 24,
    "implementation": "xla",
    "conv_size": 3,
    "mlp": seqjax.layers.GatedMLP(4, 8),
    "output_gate": True,
    "constrain": lambda x, axes: x,
    "decay_bound": -5.0,
    "eps": 1e-3,
    "feature_map": "elu",
    "value_heads": 4,
    "solver": seqjax.Newton(window=8),
    "state_dim": 8,
}
NONE |= dict.fromkeys(("decay_rank", "a_rank", "value_rank", "gate_rank"), 3)
NAMES = {
    "channel_axis": "heads",
    "dtype": "bfloat16",
    "norm": "layer",
    "norm_position": "post",
    "pool": "last",
    "feature_map": "elu",
    "normalizer": "rms",
    "slopes": "linear",
}
SPECIAL = {  # values by class and field, for layers whose fields depend on each other
    "LightningAttention": {"head_dim": 6},
    "Mamba2": {
        "dt_limit": (0.0, 0.5),
        "expand": 4,
        "groups": 1,
        "head_dim": 1,
        "heads": 6,
        "norm": "norm_first",
    },
    "Mamba3": {
        "decay": "softplus",
        "expand": 4,
        "groups": 2,
        "head_dim": 2,
        "heads": 4,
        "rope_fraction": 1.0,
    },
}
LRU = seqjax.layers.LRU(4)
MODELS = [
    seqjax.models.Block(LRU),
    seqjax.models.Backbone([LRU, seqjax.layers.ShortConv(4)], depth=2),
    seqjax.models.LanguageModel(7, seqjax.models.Backbone(LRU)),
    seqjax.models.Classifier(3, seqjax.models.Backbone(LRU), vocab_size=7),
]


def changes(layer):
    """Return another value for each field with a default, and a larger `dim`."""
    special = SPECIAL.get(type(layer).__name__, {})
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if field.name in special:
            yield field.name, special[field.name]
            continue
        if not field.init or field.name in ("vocab_size", "input_dim", "num_classes"):
            continue
        if field.name in ("dim", "depth") and value:
            yield field.name, 2 * value
        elif field.default is dataclasses.MISSING or field.name == "layer":
            continue  # `layer` must stay below `depth`
        elif field.name == "version":
            yield "version", 5
        elif field.name == "r_max":
            yield "r_max", 0.5
        elif value is None:
            yield field.name, NONE[field.name]
        elif isinstance(value, str):
            yield field.name, NAMES[field.name]
        elif field.name in ("state_dim", "head_dim", "expand_k", "expand_v"):
            yield field.name, 2 * value
        elif field.name == "blocks":
            yield "blocks", 1
        elif field.name in ("min_decay", "dt_min"):
            yield field.name, value / 2
        else:
            yield field.name, OTHER[type(value)](value)


@pytest.mark.parametrize(
    "layer", [c.layer for c in ROWS if c.layer is not None] + MODELS, ids=lambda x: type(x).__name__
)
def test_replaced_layers_equal_those_built_directly(layer):
    given = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.init}
    needed = {"vocab_size", "head_dim"} if type(layer).__name__ in SPECIAL else {"vocab_size"}
    minimal = {
        f.name: getattr(layer, f.name)
        for f in dataclasses.fields(layer)
        if f.init and (f.default is dataclasses.MISSING or f.name in needed)
    }
    for name, value in changes(layer):
        replaced = dataclasses.replace(layer, **{name: value})
        assert replaced == type(layer)(**given | {name: value})
        assert getattr(replaced, name) == value
        # Values that follow from other fields, such as the width of a head, follow the new ones.
        plain = type(layer)(**minimal)
        direct = type(layer)(**minimal | {name: value})
        replaced = dataclasses.replace(plain, **{name: value})
        assert replaced == direct
        assert hash(replaced) == hash(direct)
        assert replaced.param_shapes() == direct.param_shapes()
