"""Nemotron-H and Nemotron 3: blocks of one mixer: Mamba-2, attention, an MLP or experts."""

from seqjax.layers import MLP, Attention, Layer, Mamba2, MoE
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows

_KINDS = {
    "M": "mamba",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = (
        config.integer("hidden_size", 4096),
        config.number("layer_norm_epsilon", 1e-5, least=0),
    )
    for name, only in (
        ("mlp_hidden_act", "relu2"),
        ("mamba_hidden_act", "silu"),
        ("sliding_window", None),
        ("attention_bias", False),
    ):
        config.expect(name, only, default=only)
    attention = Attention(
        dim,
        **parts.heads(config, 32, 8),
        head_dim=config.integer(parts.present(config, "head_dim", "attention_head_dim"), 128),
        capacity=capacity,
        rotary_dim=0,
    )
    bias = config.boolean("use_bias", False)
    mamba = Mamba2(
        dim,
        state_dim=config.integer("ssm_state_size", 128),
        head_dim=config.integer("mamba_head_dim", 64),
        heads=config.integer("mamba_num_heads", 128),
        groups=config.integer("mamba_n_groups", config.get("n_groups", 8)),
        conv_size=config.integer("mamba_d_conv", config.get("conv_kernel", 4)),
        conv_bias=config.boolean("mamba_conv_bias", config.get("use_conv_bias", True)),
        in_bias=bias,
        out_bias=bias,
        norm_eps=eps,
        dt_limit=parts.dt_limit(
            config, *(["mamba_dt_limit"] if config.has("mamba_dt_limit") else [])
        ),
    )
    mlp = MLP(
        dim, config.integer("intermediate_size", 21504), bias=config.boolean("mlp_bias", False)
    )
    kinds = [_KINDS[kind] for kind in _pattern(config)]
    mixers: dict[str, Layer] = {"mamba": mamba, "attention": attention, "mlp": mlp}
    tables = {
        "mamba": parts.mamba2(mamba, "mixer."),
        "attention": parts.attention(attention, "mixer."),
        "mlp": parts.mlp(mlp, "mixer.", "mixer."),
    }
    variants: list[Tensor] = []
    if "moe" in kinds:
        layer = _moe(config, dim, mlp.bias)
        mixers["moe"] = layer
        weights = experts.separate(layer, "experts.")
        tables["moe"] = parts.inside([*weights, *_others(layer)], "mixer.", "mixer.")
        variants = [
            tensor.inside(f"@layers.{i}.mixer.", f"backbone.block_{i}.mixer.")
            for i, kind in enumerate(kinds)
            for tensor in experts.stacked(layer, "experts.")
            if kind == "moe"
        ]
    common = norm("norm", "mixer_norm", "rms")
    return Architecture(
        blocks=[Block(mixers[kind], norm_eps=eps) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embeddings.weight",
        final_norm="@norm_f",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 131072),
        tie_embeddings=False,  # the reference does not read `tie_word_embeddings`
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        variants=variants,
    )


def _pattern(config: Config) -> list[str]:
    """Return the kind of each block: the pattern's length is the depth."""
    fields = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    name = next((name for name in fields if config.has(name)), fields[0])
    value = config.get(name)
    # A pattern has a letter for each block.
    letters = isinstance(value, str) and bool(value)
    kinds = list(value) if letters else config.list_of(name, str, least=1)
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(
                f"load: config field `{name}` must have entries of {', '.join(map(repr, _KINDS))},"
                f" got {kind!r}."
            )
    return kinds


def _moe(config: Config, dim: int, bias: bool) -> MoE:
    count = config.integer("n_routed_experts", config.get("num_local_experts", 8))
    groups = config.integer("n_group", 1)
    top_groups = config.at_most("topk_group", groups, "n_group", 1)
    if count % groups or (groups > 1 and count // groups < 2):
        raise ValueError(
            "load: config field `n_group` must divide n_routed_experts into groups of two or more,"
            f" got {groups} for {count}."
        )
    allowed = count // groups * top_groups
    latent = config.integer("moe_latent_size") if config.has("moe_latent_size") else None
    return MoE(
        dim,
        experts=count,
        top_k=experts.top_k(config, allowed, "the experts to choose from", 2),
        expert=MLP(
            dim if latent is None else latent, config.integer("moe_intermediate_size", 7688)
        ),
        shared=MLP(dim, config.integer("moe_shared_expert_intermediate_size", 7688), bias=bias),
        router="sigmoid",
        renormalize=config.boolean("norm_topk_prob", True),
        groups=groups,
        top_groups=top_groups,
        routed_scale=config.number("routed_scaling_factor", 1.0),
        latent_dim=latent,
        latent_bias=bias and latent is not None,
    )


def _others(layer: MoE) -> list[Tensor]:
    """Return the tensors of a mixture of experts other than those of the routed experts."""
    assert layer.shared is not None
    table = [
        experts.router("gate.weight"),
        rows("gate.e_score_correction_bias", "correction_bias", wide=True),
        *parts.mlp(layer.shared, "shared_experts.", "shared."),
    ]
    for stored, ours in (("fc1_latent_proj", "latent_down"), ("fc2_latent_proj", "latent_up")):
        if ours in layer.declare_params():
            table.append(linear(f"{stored}.weight", ours))
        if layer.latent_bias:
            table.append(rows(f"{stored}.bias", f"{ours}_bias"))
    return table


NEMOTRON_H = Family(_build, ("backbone.", "model."), ignored=(r"(^|\.)mtp\.",))
