"""Jamba (arXiv 2403.19887): Mamba layers with some layers of attention and of experts."""

from seqjax.layers import Attention, GatedMLP, Layer, Mamba, MoE
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-6, least=0)
    config.expect("hidden_act", "silu", default="silu")
    config.expect("mamba_inner_layernorms", True, default=True)
    depth = config.integer("num_hidden_layers", 32)
    attention = Attention(
        dim,
        **parts.heads(config, 32, 8),
        capacity=capacity,
        rotary_dim=0,
    )
    mamba = Mamba(
        dim,
        **parts.mamba_options(config),
        inner_norm_eps=eps,
        inner_norm_scales=True,
    )
    mlp = GatedMLP(dim, config.integer("intermediate_size", 14336))
    field = parts.present(config, "num_experts", "num_local_experts")
    count = config.integer(field, 16)
    sparse = [count > 1 and kind for kind in parts.every(config, "expert_layer", depth, 2, 1)]
    mlps: dict[bool, Layer] = {False: mlp}
    mlp_tables = {False: parts.mlp(mlp, "feed_forward.")}
    variants: list[Tensor] = []
    if any(sparse):
        top_k = experts.top_k(config, count, field, 2)
        moe = MoE(dim, count, top_k, expert=mlp, renormalize=False)
        mlps[True] = moe
        weights = [experts.router("router.weight"), *experts.separate(moe, "experts.")]
        mlp_tables[True] = parts.inside(weights, "feed_forward.", "mlp.")
        variants = [
            tensor.inside(f"@layers.{i}.feed_forward.", f"backbone.block_{i}.mlp.")
            for i, kind in enumerate(sparse)
            for tensor in experts.stacked(moe, "experts.")
            if kind
        ]
    attended = parts.every(config, "attn_layer", depth, 8, 4)
    mixers: dict[bool, Layer] = {True: attention, False: mamba}
    tables = {True: parts.attention(attention), False: parts.mamba(mamba, "mamba.")}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm("pre_ff_layernorm", "mlp_norm", "rms"),
    ]
    return Architecture(
        blocks=[
            Block(mixers[own], mlps[kind], norm_eps=eps)
            for own, kind in zip(attended, sparse, strict=True)
        ],
        tables=[
            [*common, *tables[own], *mlp_tables[kind]]
            for own, kind in zip(attended, sparse, strict=True)
        ],
        embedding="@embed_tokens.weight",
        final_norm="@final_layernorm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 65536),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        variants=variants,
    )


JAMBA = Family(_build, ("model.",))
