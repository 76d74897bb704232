"""Models of flash-linear-attention ("fla-hub"): one backbone with the mixers of seven papers."""

import functools
from collections.abc import Callable

from seqjax.layers import GLA, HGRN, HGRN2, KDA, DeltaNet, GatedMLP, RetNet
from seqjax.layers._base import Layer
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, Size, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows

Mixer = tuple[Layer, list[Tensor]]
Make = Callable[[Config, int, float], Mixer]


def _build(config: Config, capacity: int, make: Make, ratio: int, depth: int) -> Architecture:
    del capacity
    dim, eps = config.integer("hidden_size", 2048), config.number("norm_eps", 1e-6, least=0)
    config.expect("hidden_act", "swish", "silu", default="swish")
    for name in ("attn", "attnres_block_size"):
        config.expect(name, None, default=None)
    mixer, mixer_table = make(config, dim, eps)
    null_ratio = 4 if "hidden_ratio" in config.values else ratio
    width = int(dim * config.number("hidden_ratio", null_ratio) * 2 / 3)
    mlp = GatedMLP(dim, config.integer("intermediate_size", -(-width // 256) * 256))
    table = [
        *norm("attn_norm", "mixer_norm", "rms"),
        *norm("mlp_norm", "mlp_norm", "rms"),
        *parts.inside(mixer_table, "attn.", "mixer."),
        *parts.mlp(mlp),
    ]
    depth = config.integer("num_hidden_layers", depth)
    bounds = []
    if isinstance(mixer, HGRN | HGRN2) and mixer.lower_bound:
        params = [f"backbone.block_{i}.mixer.lower_bound" for i in range(depth)]
        states = mixer.states if isinstance(mixer, HGRN) else mixer.heads * mixer.key_dim
        bounds.append(rows("@lower_bounds", *params, shape=(depth, states)))
    return Architecture(
        blocks=[Block(mixer, mlp, norm_eps=eps)] * depth,
        tables=[table] * depth,
        embedding="@embeddings.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 32000),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        extra=bounds,
    )


def _gla(config: Config, dim: int, eps: float) -> Mixer:
    _plain(config)
    config.expect("clamp_min", None, default=None)
    heads = config.integer("num_heads", 4)
    keys, values = (_width(config, name, dim, heads) for name in (("k", 0.5), ("v", 1.0)))
    taps = config.integer("conv_size", 4) if config.boolean("use_short_conv", False) else None
    layer = GLA(
        dim,
        heads,
        expand_k=keys / dim,
        expand_v=values / dim,
        gate_rank=config.integer("gate_low_rank_dim", 16),
        conv_size=taps,
        norm_eps=eps,
    )
    table = [
        *_projections(taps is not None),
        linear("gk_proj.0.weight", "decay_down"),
        linear("gk_proj.1.weight", "decay_up"),
        rows("gk_proj.1.bias", "decay_bias"),
        linear("g_proj.weight", "gate_proj"),
        _gated_norm(config),
    ]
    return layer, table


def _retnet(config: Config, dim: int, eps: float) -> Mixer:
    _plain(config)  # the reference does not read use_short_conv here
    heads = config.integer("num_heads", 8)
    keys, values = (_width(config, name, dim, heads) for name in (("k", 1.0), ("v", 2.0)))
    if keys // heads % 2:
        raise ValueError(
            "load: config field `expand_k` must give an even number of features per head, got"
            f" {keys // heads}."
        )
    layer = RetNet(dim, heads, expand_k=keys / dim, expand_v=values / dim, norm_eps=eps)
    gate = linear("g_proj.weight", "gate_proj")
    return layer, [*_projections(False), gate, _gated_norm(config)]


def _plain(config: Config) -> None:
    """Refuse options of GLA and RetNet that the layers do not have."""
    config.expect("num_kv_heads", None, config.get("num_heads", None), default=None)
    config.expect("feature_map", None, default=None)
    config.expect("use_output_gate", True, default=True)
    config.expect("elementwise_affine", True, default=True)


def _hgrn(config: Config, dim: int, eps: float) -> Mixer:
    _without_conv(config)
    states = dim * config.number("expand_ratio", 1)
    if states != int(states) or states < 1:
        raise ValueError(
            "load: config field `expand_ratio` must give an integer number of channels, got"
            f" {config.get('expand_ratio', 1)!r} times {dim}."
        )
    bound = config.boolean("use_lower_bound", True)
    layer = HGRN(dim, int(states), lower_bound=bound, norm_eps=eps)
    return layer, _hgrn_table("input", "forget", "gate")


def _hgrn2(config: Config, dim: int, eps: float) -> Mixer:
    del eps  # the reference always has the default of its norm
    _without_conv(config)
    # As in the reference, `expand_ratio` comes before `num_heads`; null stands for the quotient.
    size = config.values.get("expand_ratio", 128)
    if size is None:
        size = dim // config.at_most("num_heads", dim, "hidden_size")
    else:
        size = config.integer("expand_ratio", 128)
    if dim % size:
        raise ValueError(
            f"load: config field `expand_ratio` must divide hidden_size = {dim}, got {size}."
        )
    bound = config.boolean("use_lower_bound", True)
    layer = HGRN2(dim, dim // size, lower_bound=bound, norm_eps=1e-5)
    return layer, _hgrn_table("input", "forget", "q")


def _without_conv(config: Config) -> None:
    config.expect("use_short_conv", False, default=False)
    config.expect("elementwise_affine", True, default=True)


def _hgrn_table(*names: str) -> list[Tensor]:
    """Return the tensors of HGRN and HGRN2, whose projections are named by a letter."""
    table = [linear(f"{name[0]}_proj.weight", f"{name}_proj") for name in names]
    return [*table, linear("o_proj.weight", "out_proj"), rows("g_norm.weight", "norm")]


def _delta_net(config: Config, dim: int, eps: float) -> Mixer:
    for name, only in (
        ("use_short_conv", True),
        ("use_beta", True),
        ("qk_norm", "l2"),
        ("qk_activation", "silu"),
    ):
        config.expect(name, only, default=only)
    heads = config.integer("num_heads", 16)
    keys, values = (_width(config, name, dim, heads) for name in (("k", 1.0), ("v", 1.0)))
    layer = DeltaNet(
        dim,
        heads,
        head_dim=keys // heads,
        expand_v=values / keys,
        conv_size=config.integer("conv_size", 4),
        negative_eigenvalues=config.boolean("allow_neg_eigval", False),
        output_gate=config.boolean("use_gate", False),
        norm_eps=eps,
    )
    return layer, _delta_table(layer.gates_output)


def _gated_deltanet(config: Config, dim: int, eps: float) -> Mixer:
    config.expect("use_short_conv", True, default=True)
    config.expect("output_gate_activation", "swish", "silu", default="swish")
    heads, value_heads, size, expand = _value_heads(config, 6, 256, 2.0)
    layer = DeltaNet(
        dim,
        heads,
        head_dim=size,
        expand_v=expand,
        value_heads=value_heads,
        conv_size=config.integer("conv_size", 4),
        gated=True,
        negative_eigenvalues=config.boolean("allow_neg_eigval", False),
        output_gate=config.boolean("use_gate", True),
        norm_eps=eps,
    )
    table = [linear("a_proj.weight", "a_proj"), rows("A_log", "A_log"), rows("dt_bias", "dt_bias")]
    return layer, [*_delta_table(layer.gates_output), *table]


def _kda(config: Config, dim: int, eps: float) -> Mixer:
    config.expect("use_short_conv", True, default=True)
    bound = config.number("lower_bound") if config.has("lower_bound") else None
    if config.boolean("safe_gate", False) and bound is None:
        bound = config.number("lower_bound")
    if bound is not None and bound >= 0:
        raise ValueError(f"load: config field `lower_bound` must be < 0, got {bound!r}.")
    heads, value_heads, size, expand = _value_heads(config, 16, 128, 1.0)
    layer = KDA(
        dim,
        heads,
        head_dim=size,
        expand_v=expand,
        value_heads=value_heads,
        conv_size=config.integer("conv_size", 4),
        negative_eigenvalues=config.boolean("allow_neg_eigval", False),
        decay_bound=bound,
        norm_eps=eps,
    )
    shape = (1, 1, value_heads, 1) if config.has(_A_LOG_AXES) else None  # of older files
    table = [
        *_delta_table(gated=False),
        rows("A_log", "A_log", shape=shape),
        rows("dt_bias", "dt_bias"),
        rows("g_proj.1.bias", "gate_bias"),
    ]
    for stored, ours in (("f", "decay"), ("g", "gate")):
        table.append(linear(f"{stored}_proj.0.weight", f"{ours}_down"))
        table.append(linear(f"{stored}_proj.1.weight", f"{ours}_up"))
    return layer, table


def _width(config: Config, letter_and_default: tuple[str, float], dim: int, heads: int) -> int:
    """Return the key ("k") or value ("v") features of all heads."""
    letter, default = letter_and_default
    factor = config.number(f"expand_{letter}", default)
    width = round(dim * factor)
    if abs(dim * factor - width) > 1e-6 or width < 1 or width % heads:
        raise ValueError(
            f"load: config field `expand_{letter}` must give a multiple of num_heads = {heads}"
            f" features, got {factor!r} times hidden_size = {dim}."
        )
    return width


def _value_heads(
    config: Config, heads: int, size: int, expand: float
) -> tuple[int, int, int, float]:
    """Return heads, value heads, key features per head and V / K, given their defaults."""
    heads = config.integer("num_heads", heads)
    value_heads = config.integer("num_v_heads", heads)
    if value_heads % heads:
        raise ValueError(
            f"load: config field `num_v_heads` must be a multiple of num_heads = {heads}, got"
            f" {value_heads}."
        )
    size, expand = config.integer("head_dim", size), config.number("expand_v", expand)
    values = round(size * expand)
    if values < 1 or abs(size * expand - values) > 1e-5:
        raise ValueError(
            "load: config field `expand_v` must give an integer number of features per head, got"
            f" {expand!r} times head_dim = {size}."
        )
    return heads, value_heads, size, values / size


def _projections(convolutions: bool) -> list[Tensor]:
    table = [linear(f"{name}_proj.weight", f"{name}_proj") for name in "qkv"]
    table.append(linear("o_proj.weight", "out_proj"))
    if convolutions:
        table += [conv(f"{name}_conv1d.weight", f"{name}_conv.weight") for name in "qkv"]
    return table


def _gated_norm(config: Config) -> Tensor:
    """Return the norm before the output gate, whose name depends on the reference's kernel."""
    fused = config.boolean("fuse_norm", True) and config.get("hidden_act", "swish") == "swish"
    names = ("g_norm_swish_gate.weight", "g_norm.weight")
    return rows(names[0 if fused else 1], "norm", aliases=[names[1 if fused else 0]])


def _delta_table(gated: bool) -> list[Tensor]:
    table = [
        *_projections(True),
        linear("b_proj.weight", "beta_proj"),
        rows("o_norm.weight", "norm"),
    ]
    return [*table, linear("g_proj.weight", "gate_proj")] if gated else table


def _family(make: Make, *sizes: Size, ratio: int = 4, depth: int = 24) -> Family:
    build = functools.partial(_build, make=make, ratio=ratio, depth=depth)
    return Family(build, ("model.",), sizes=sizes)


_A_LOG_AXES = "A_log_axes"
GLA_FAMILY = _family(_gla, ("gate_low_rank_dim", ("@layers.0.attn.gk_proj.0.weight",), 0))
RETNET = _family(_retnet, ratio=2)
HGRN_FAMILY = _family(_hgrn)
HGRN2_FAMILY = _family(_hgrn2)
DELTA_NET = _family(_delta_net)
GATED_DELTANET = _family(_gated_deltanet, depth=21)
KDA_FAMILY = _family(_kda, (_A_LOG_AXES, ("@layers.0.attn.A_log",), 3))
