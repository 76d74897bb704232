"""Mamba (arXiv 2312.00752) and Falcon Mamba (arXiv 2410.05355)."""

import functools
from typing import Any

from seqjax.layers import Mamba
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm


def _build(config: Config, capacity: int, **defaults: Any) -> Architecture:
    del capacity
    dim, eps = config.integer("hidden_size"), config.number("layer_norm_epsilon", 1e-5, least=0)
    config.expect("hidden_act", "silu", default="silu")
    rank = config.get("time_step_rank", "auto")
    mixer = Mamba(
        dim,
        state_dim=config.integer("state_size", 16),
        expand=config.integer("expand", 2),
        conv_size=config.integer("conv_kernel", 4),
        dt_rank=None if rank == "auto" else config.integer("time_step_rank"),
        bias=config.boolean("use_bias", False),
        conv_bias=config.boolean("use_conv_bias", True),
        inner_norm_eps=config.number("mixer_rms_eps", 1e-6, least=0)
        if defaults["inner_norms"]
        else None,
    )
    depth = config.integer("num_hidden_layers", 32)
    block = Block(mixer, norm_eps=eps)
    return Architecture(
        blocks=[block] * depth,
        tables=[[*norm("norm", "mixer_norm", "rms"), *parts.mamba(mixer)]] * depth,
        embedding="@embeddings.weight",
        embedding_aliases=("@embedding.weight",),
        final_norm="@norm_f",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", defaults["vocab_size"]),
        tie_embeddings=config.boolean("tie_word_embeddings", True),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


_PREFIXES = ("backbone.", "model.")
MAMBA = Family(functools.partial(_build, inner_norms=False, vocab_size=50280), _PREFIXES)
FALCON_MAMBA = Family(functools.partial(_build, inner_norms=True, vocab_size=50280), _PREFIXES)
