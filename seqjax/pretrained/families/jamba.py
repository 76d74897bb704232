"""Jamba (arXiv 2403.19887), dense: Mamba layers with some layers of attention."""

from seqjax.layers import Attention, GatedMLP, Mamba
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-6)
    config.expect("hidden_act", "silu", default="silu")
    config.expect("mamba_inner_layernorms", True, default=True)
    depth = config.integer("num_hidden_layers", 32)
    sparse = parts.every(config, "expert_layer", depth, 2, 1)
    if any(sparse):
        config.expect("num_experts", 1, default=config.get("num_local_experts", 16))
    attention = Attention(
        dim,
        **parts.heads(config, 32, 8),
        capacity=capacity,
        rotary_dim=0,
    )
    rank = config.get("mamba_dt_rank", "auto")
    mamba = Mamba(
        dim,
        state_dim=config.integer("mamba_d_state", 16),
        expand=config.integer("mamba_expand", 2),
        conv_size=config.integer("mamba_d_conv", 4),
        dt_rank=None if rank == "auto" else config.integer("mamba_dt_rank"),
        bias=config.boolean("mamba_proj_bias", False),
        conv_bias=config.boolean("mamba_conv_bias", True),
        inner_norm_eps=eps,
        inner_norm_scales=True,
    )
    mlp = GatedMLP(dim, config.integer("intermediate_size", 14336))
    attended = parts.every(config, "attn_layer", depth, 8, 4)
    mixers = {True: attention, False: mamba}
    tables = {True: parts.attention(attention), False: parts.mamba(mamba, "mamba.")}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm("pre_ff_layernorm", "mlp_norm", "rms"),
        *parts.gated_mlp(mlp, "feed_forward."),
    ]
    return Architecture(
        blocks=[Block(mixers[kind], mlp, norm_eps=eps) for kind in attended],
        tables=[[*common, *tables[kind]] for kind in attended],
        embedding="@embed_tokens.weight",
        final_norm="@final_layernorm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 65536),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


JAMBA = Family(_build, ("model.",))
