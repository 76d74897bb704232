"""Parts that several families share: attention, MLPs and the Mamba-2 mixer, with their tensors."""

import math
from typing import Any, TypedDict

from seqjax.layers import MLP, Attention, GatedMLP, Layer, Mamba, Mamba2
from seqjax.layers.mlp import ActivationName
from seqjax.pretrained.config import Config
from seqjax.pretrained.table import Tensor, conv, linear, rows


class Heads(TypedDict):
    """Numbers of heads, as keywords of `Attention`."""

    heads: int
    kv_heads: int


def heads(config: Config, default: int = 32, kv_default: int | None = None) -> Heads:
    """Return the numbers of heads of an attention layer."""
    count = config.integer("num_attention_heads", default)
    shared = count if kv_default is None else kv_default
    return {"heads": count, "kv_heads": config.integer("num_key_value_heads", shared)}


def rotary(head_dim: int, share: float) -> int:
    """Return the number of rotated features of a head."""
    size = int(head_dim * share)
    if size % 2:
        raise ValueError(
            "load: config field `partial_rotary_factor` must rotate an even number of the"
            f" {head_dim} features of a head, got {share!r}."
        )
    return size


def even(name: str, value: int) -> int:
    """Return the value of a field that must be even."""
    if value % 2:
        raise ValueError(f"load: config field `{name}` must be even, got {value}.")
    return value


def attention(layer: Attention, stored: str = "self_attn.", ours: str = "mixer.") -> list[Tensor]:
    """Return the tensors of an attention layer, with the usual names."""
    query = ("q_proj", "gate_proj") if layer.output_gate else ("q_proj",)
    table = [
        linear("q_proj.weight", *query, groups=layer.heads if layer.output_gate else 1),
        linear("k_proj.weight", "k_proj"),
        linear("v_proj.weight", "v_proj"),
        linear("o_proj.weight", "out_proj"),
    ]
    if layer.bias:
        biases = [name.replace("_proj", "_bias") for name in query]
        table.append(rows("q_proj.bias", *biases, groups=layer.heads if layer.output_gate else 1))
        table += [rows(f"{name}_proj.bias", f"{name}_bias") for name in "kv"]
    if layer.out_bias:
        table.append(rows("o_proj.bias", "out_bias"))
    if layer.qk_norm is not None:
        table += [rows(f"{name}_norm.weight", f"{name}_norm") for name in "qk"]
    return inside(table, stored, ours)


_ACTIVATIONS: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def activation(config: Config, default: str, name: str = "hidden_act") -> ActivationName:
    """Return the activation of an MLP; `default` is the reference's name of it."""
    return _ACTIVATIONS[config.expect(name, *_ACTIVATIONS, default=default)]


def mlp(layer: Layer, stored: str = "mlp.", ours: str = "mlp.") -> list[Tensor]:
    """Return the tensors of an MLP with or without a gate."""
    assert isinstance(layer, MLP | GatedMLP)
    names = ("gate", "up", "down") if isinstance(layer, GatedMLP) else ("up", "down")
    table = [linear(f"{name}_proj.weight", f"{name}_proj") for name in names]
    if layer.bias:
        table += [rows(f"{name}_proj.bias", f"{name}_bias") for name in names]
    return inside(table, stored, ours)


def mamba_options(config: Config) -> dict[str, Any]:
    """Return the options of Mamba, from the fields that Jamba and Zamba have."""
    rank = config.get("mamba_dt_rank", "auto")
    return {
        "state_dim": config.integer("mamba_d_state", 16),
        "expand": config.integer("mamba_expand", 2),
        "conv_size": config.integer("mamba_d_conv", 4),
        "dt_rank": None if rank == "auto" else config.integer("mamba_dt_rank"),
        "bias": config.boolean("mamba_proj_bias", False),
        "conv_bias": config.boolean("mamba_conv_bias", True),
    }


def mamba(layer: Mamba, stored: str = "mixer.", ours: str = "mixer.") -> list[Tensor]:
    """Return the tensors of a Mamba mixer."""
    table = [
        linear("in_proj.weight", "in_proj", "gate_proj"),
        conv("conv1d.weight", "conv.weight"),
        linear("x_proj.weight", "x_proj"),
        linear("dt_proj.weight", "dt_proj"),
        rows("dt_proj.bias", "dt_bias"),
        rows("A_log", "A_log"),
        rows("D", "D", wide=True),
        linear("out_proj.weight", "out_proj"),
    ]
    if layer.bias:
        table.append(rows("in_proj.bias", "in_bias", "gate_bias"))
        table.append(rows("out_proj.bias", "out_bias"))
    if layer.conv_bias:
        table.append(rows("conv1d.bias", "conv.bias"))
    if layer.inner_norm_scales:
        names = {"dt": "dt", "b": "B", "c": "C"}
        table += [rows(f"{name}_layernorm.weight", f"{names[name]}_norm") for name in names]
    return inside(table, stored, ours)


def mamba2_fields(config: Config, dim: int, inner: int | None = None) -> dict[str, Any]:
    """Return the fields of `Mamba2` from a config with the names `mamba_n_heads` and so on.

    Args:
      config: the config.
      dim: features of the model.
      inner: features of all heads; by default `mamba_expand` times `dim`.
    """
    count = config.integer("mamba_n_heads", 128)
    inner = config.integer("mamba_expand", 2) * dim if inner is None else inner
    size = config.get("mamba_d_head", "auto")
    size = inner // count if size == "auto" else config.integer("mamba_d_head")
    if size * count != inner:
        raise ValueError(
            "load: config field `mamba_d_head` must be the inner width over mamba_n_heads,"
            f" {inner / count:g}, got {size}."
        )
    return {
        "state_dim": config.integer("mamba_d_state", 256),
        "head_dim": size,
        "heads": count,
        "groups": config.integer("mamba_n_groups", 1),
        "conv_size": config.integer("mamba_d_conv", 4),
        "conv_bias": config.boolean("mamba_conv_bias", True),
        "in_bias": config.boolean("mamba_proj_bias", False),
        "dt_limit": dt_limit(config),
    }


def positive(config: Config, name: str, default: float) -> float:
    """Return a field that must be a number > 0."""
    value = config.number(name, default)
    if value <= 0:
        raise ValueError(f"load: config field `{name}` must be > 0, got {value!r}.")
    return value


def dt_limit(config: Config, name: str = "time_step_limit") -> tuple[float, float]:
    """Return the smallest and the largest step size."""
    low, high = config.list_of(name, float, [0.0, math.inf], length=2)
    return low, high


def mamba2(layer: Mamba2, stored: str = "mamba.", ours: str = "mixer.") -> list[Tensor]:
    """Return the tensors of a Mamba-2 mixer."""
    names = ("gate", "in", "B", "C", "dt")
    table = [
        linear("in_proj.weight", *(f"{name}_proj" for name in names)),
        conv("conv1d.weight", *(f"{name}_conv.weight" for name in "uBC")),
        rows("dt_bias", "dt_bias"),
        rows("A_log", "A_log"),
        rows("D", "D", wide=True),
        linear("out_proj.weight", "out_proj"),
    ]
    if layer.conv_bias:
        table.append(rows("conv1d.bias", *(f"{name}_conv.bias" for name in "uBC")))
    if layer.in_bias:
        table.append(rows("in_proj.bias", *(f"{name}_bias" for name in names[:-1]), "dt_proj_bias"))
    if layer.out_bias:
        table.append(rows("out_proj.bias", "out_bias"))
    if layer.norm is not None:
        table.append(rows("norm.weight", "norm"))
    return inside(table, stored, ours)


def inside(table: list[Tensor], stored: str, ours: str) -> list[Tensor]:
    """Return a table with prefixes before its names."""
    return [tensor.inside(stored, ours) for tensor in table]


def present(config: Config, *names: str) -> str:
    """Return the first of a field's names that a config has, or the first name."""
    return next((name for name in names if config.has(name)), names[0])


_TYPES = {
    "linear_attention": "linear",
    "mamba": "linear",
    "full_attention": "attention",
    "attention": "attention",
}


def layer_types(config: Config, default: list[str], *names: str, **others: str) -> list[str]:
    """Return the kind of each layer: "linear", "attention", or that of another published name.

    Args:
      config: the config.
      default: the published kinds if the config has none.
      names: the field's new and old names.
      others: further kinds by their published name.
    """
    known = _TYPES | others
    name = present(config, *names)
    kinds = config.list_of(name, str, default)
    depth = config.integer("num_hidden_layers", len(default))
    if len(kinds) != depth:
        raise ValueError(
            f"load: config field `{name}` must have num_hidden_layers = {depth} entries, got"
            f" {len(kinds)}."
        )
    for kind in kinds:
        if kind not in known:
            raise ValueError(
                f"load: config field `{name}` must have entries of {', '.join(map(repr, known))},"
                f" got {kind!r}."
            )
    return [known[kind] for kind in kinds]


def every(config: Config, prefix: str, depth: int, period: int, offset: int) -> list[bool]:
    """Return for each layer whether it is one of those that come once in a period.

    Args:
      config: the config.
      prefix: the start of the fields' names, before "_period" and "_offset".
      depth: number of layers.
      period: the reference's default period.
      offset: the reference's default index of the first layer.
    """
    period = config.integer(f"{prefix}_period", period)
    name = f"{prefix}_offset"
    offset = config.get(name, offset)
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < period:
        raise ValueError(
            f"load: config field `{name}` must be from 0 to {prefix}_period - 1 = {period - 1},"
            f" got {offset!r}."
        )
    return [i % period == offset for i in range(depth)]
