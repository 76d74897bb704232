"""Nemotron-H, dense: blocks of one mixer each, which is Mamba-2, attention or an MLP."""

from seqjax.layers import MLP, Attention, Mamba2
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows

_KINDS = {
    "M": "mamba",
    "*": "attention",
    "-": "mlp",
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
}


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("layer_norm_epsilon", 1e-5)
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
        head_dim=config.integer("head_dim", 128),
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
    mixers = {"mamba": mamba, "attention": attention, "mlp": mlp}
    tables = {
        "mamba": parts.mamba2(mamba, "mixer."),
        "attention": parts.attention(attention, "mixer."),
        "mlp": _mlp(mlp),
    }
    kinds = [_KINDS[kind] for kind in _pattern(config)]
    common = norm("norm", "mixer_norm", "rms")
    return Architecture(
        blocks=[Block(mixers[kind], norm_eps=eps) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embeddings.weight",
        final_norm="@norm_f",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 131072),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


def _pattern(config: Config) -> list[str]:
    """Return the kind of each block: the pattern's length is the depth."""
    fields = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    name = next((name for name in fields if config.has(name)), fields[0])
    kinds = list(config.get(name))
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(
                f"load: config field `{name}` must have entries of {', '.join(map(repr, _KINDS))},"
                f" got {kind!r}; mixtures of experts are not supported yet."
            )
    return kinds


def _mlp(mlp: MLP) -> list[Tensor]:
    table = [linear("up_proj.weight", "up_proj"), linear("down_proj.weight", "down_proj")]
    if mlp.bias:
        table += [rows("up_proj.bias", "up_bias"), rows("down_proj.bias", "down_bias")]
    return parts.inside(table, "mixer.", "mixer.")


NEMOTRON_H = Family(_build, ("backbone.", "model."), ignored=(r"^mtp\.",))
