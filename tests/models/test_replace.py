"""`dataclasses.replace` of a layer or model equals direct construction."""

import dataclasses
import types
import typing

import pytest

import seqjax
from tests.contract.harness import ROWS

# Other values by the name of the field, where the type of the field does not give any.
VALUES = {
    "algorithm": ["sequential"],
    "blocks": [1],
    "channel_axis": ["heads"],
    "constrain": [lambda x, axes: x],
    "implementation": ["xla"],
    "dt_limit": [(0.0, 0.5)],
    "dtype": ["bfloat16"],
    "injection": [seqjax.layers.GatedMLP(4, 8)],
    "layer": [],  # must stay below `depth`
    "expert": [seqjax.layers.GatedMLP(4, 8)],
    "mlp": [seqjax.layers.GatedMLP(4, 8)],
    "param_scales": [()],
    "rope_base": [100.0],
    "shared": [seqjax.layers.GatedMLP(4, 8)],
    "state_limit": [seqjax.methods.StateWindow(3)],
    "stream_factors": [(0.5, 2.0)],
    "solver": [seqjax.Newton(window=8)],
}
BY_TYPE = {
    bool: lambda value: [not value],
    int: lambda value: [value + 1, 2 * value, value // 2, 3, 4, 6] if value else [1, 2, 3, 4, 6],
    float: lambda value: [0.75 * value + 0.2, 2 * value, value / 2] if value else [0.5, -5.0],
}
LRU = seqjax.layers.LRU(4)
MODELS = [
    seqjax.models.Block(LRU),
    seqjax.models.Backbone([LRU, seqjax.layers.ShortConv(4)], depth=2),
    seqjax.models.LanguageModel(7, seqjax.models.Backbone(LRU)),
    seqjax.models.Classifier(3, seqjax.models.Backbone(LRU), vocab_size=7),
]


def other_values(layer, field):
    """Return candidates for another value of a field, by its name or its type."""
    if field.name in VALUES:
        return VALUES[field.name]
    kind, value = typing.get_type_hints(type(layer))[field.name], getattr(layer, field.name)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    found = []
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            found += [choice for choice in typing.get_args(kind) if choice != value]
        elif kind in BY_TYPE:
            found += BY_TYPE[kind](value)
        elif typing.get_origin(kind) is typing.Union:
            found += [c for k in typing.get_args(kind) for c in typing.get_args(k) if c != value]
    assert found, f"{type(layer).__name__}.{field.name}: add other values to VALUES"
    return found


def accepted(layer, keywords):
    """Return whether the constructor accepts the keywords."""
    try:
        type(layer)(**keywords)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "layer", [c.layer for c in ROWS if c.layer is not None] + MODELS, ids=lambda x: type(x).__name__
)
def test_replaced_layers_equal_those_built_directly(layer):
    """Replace each field by another value, in the layer and in one with defaults.

    Fields depend on each other, so the first value counts that the constructor accepts.
    """
    fields = [f for f in dataclasses.fields(layer) if f.init]
    given = {f.name: getattr(layer, f.name) for f in fields}
    needed = {f.name for f in fields if f.default is dataclasses.MISSING} | {"vocab_size"}
    minimal = {name: value for name, value in given.items() if name in needed}
    starts = [start for start in (given, minimal) if accepted(layer, start)]
    changed = set()
    for field in fields:
        name = field.name
        if name in needed and name not in ("dim", "depth"):
            continue
        if name in ("input_dim", "num_classes"):
            continue
        for start in starts:
            values = [v for v in other_values(layer, field) if accepted(layer, start | {name: v})]
            for value in values[:1]:
                changed.add(name)
                # Values that follow from others, such as the width of a head, follow the new ones.
                direct = type(layer)(**start | {name: value})
                replaced = dataclasses.replace(type(layer)(**start), **{name: value})
                assert replaced == direct
                assert getattr(replaced, name) == value
                assert hash(replaced) == hash(direct)
                assert replaced.param_shapes() == direct.param_shapes()
    names = {f.name for f in fields} - {"dim", "depth", "input_dim", "num_classes"} - needed
    # `layer` must stay below `depth`, and the variants of `MLSTM` determine `normalizer`. Fields of
    # `MoE` require others, which one of its rows has.
    fixed = {"layer", "normalizer", "present_share"}
    if isinstance(layer, seqjax.layers.MLSTM):  # its other variants read these
        fixed |= {"expand", "expand_k", "expand_v", "gate_cap", "conv_size", "block"}
    if isinstance(layer, seqjax.layers.MoE):
        fixed |= {"groups", "latent_bias", "shared_gate"}
    if not getattr(layer, "inner_norm_eps", True):  # a row of `Mamba` has it
        fixed |= {"inner_norm_scales"}
    assert names - changed <= fixed
