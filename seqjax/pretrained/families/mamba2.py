"""Mamba-2 (arXiv 2405.21060) and Codestral Mamba."""

from seqjax.layers import Mamba2
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm


def _build(config: Config, capacity: int) -> Architecture:
    del capacity
    dim, eps = (
        config.integer("hidden_size", 4096),
        config.number("layer_norm_epsilon", 1e-5, least=0),
    )
    config.expect("hidden_act", "silu", default="silu")
    bias = config.boolean("use_bias", False)
    mixer = Mamba2(
        dim,
        state_dim=config.integer("state_size", 128),
        head_dim=config.integer("head_dim", 64),
        heads=config.integer("num_heads", 128),
        groups=config.integer("n_groups", 8),
        conv_size=config.integer("conv_kernel", 4),
        conv_bias=config.boolean("use_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        norm_eps=eps,
        dt_limit=parts.dt_limit(config),
    )
    depth = config.integer("num_hidden_layers", 64)
    table = [*norm("norm", "mixer_norm", "rms"), *parts.mamba2(mixer, "mixer.")]
    return Architecture(
        blocks=[Block(mixer, norm_eps=eps)] * depth,
        tables=[table] * depth,
        embedding="@embeddings.weight",
        embedding_aliases=("@embedding.weight",),
        final_norm="@norm_f",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 32768),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


MAMBA2 = Family(_build, ("backbone.", "model."))
