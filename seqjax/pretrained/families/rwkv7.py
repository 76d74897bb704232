"""RWKV-7 (arXiv 2503.14456), with the names of fla-hub."""

from seqjax.layers import RWKV7, RWKVChannelMix
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows

_UNUSED = ("mixer.v0", "mixer.v1", "mixer.v2")  # in the first layer, whose values are the first


def _build(config: Config, capacity: int) -> Architecture:
    del capacity
    dim, eps = config.integer("hidden_size", 2048), config.number("norm_eps", 1e-5, least=0)
    config.expect("hidden_act", "sqrelu", default="sqrelu")
    config.expect("attn", None, default=None)
    config.expect("norm_first", True, default=True)
    config.expect("norm_bias", True, default=True)
    head_dim = config.integer("head_dim", 64)
    heads = config.integer("num_heads", max(dim // head_dim, 1))
    if heads * head_dim != dim or config.get("value_dim", None) not in (
        None,
        dim,
        [dim] * config.integer("num_hidden_layers", 24),
    ):
        raise ValueError(
            f"load: config field `head_dim` must be hidden_size / num_heads = {dim / heads:g}, and"
            f" `value_dim` hidden_size, got {head_dim} and {config.get('value_dim', None)}."
        )
    mixer = RWKV7(
        dim,
        heads=heads,
        decay_rank=_rank(config, "decay"),
        a_rank=_rank(config, "a"),
        value_rank=_rank(config, "v"),
        gate_rank=_rank(config, "gate"),
        norm_eps=eps,
    )
    width = config.integer("intermediate_size", int(config.number("hidden_ratio", 4.0) * dim))
    mlp = RWKVChannelMix(dim, hidden_dim=width)
    depth = config.integer("num_hidden_layers", 24)
    common = [
        *norm("attn_norm", "mixer_norm", "layer"),
        *norm("ffn_norm", "mlp_norm", "layer"),
        *_time_mix(mixer),
        *_channel_mix(dim),
    ]
    later = parts.inside(_low_rank("v"), "attn.", "mixer.")
    return Architecture(
        blocks=[Block(mixer, mlp, norm="layer", norm_eps=eps)] * depth,
        tables=[common if i == 0 else [*common, *later] for i in range(depth)],
        embedding="@embeddings.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 32000),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="layer",
        norm_eps=eps,
        model={"embedding_scale": 1.0, "embedding_norm": "layer"},
        extra=norm("@layers.0.pre_norm", "embedding_norm", "layer"),
        variants=[
            rows(
                f"@layers.{i}.attn.x_x",
                *(f"backbone.block_{i}.mixer.x_{name}" for name in "rwkvag"),
                shape=(6, dim),
            )
            for i in range(depth)
        ],
        unused=tuple(f"backbone.block_0.{name}" for name in _UNUSED),
    )


def _rank(config: Config, name: str) -> int | None:
    """Return the rank of a low-rank map; null stands for the layer's own default."""
    field = f"{name}_low_rank_dim"
    return config.integer(field) if config.has(field) else None


def _time_mix(layer: RWKV7) -> list[Tensor]:
    dim = layer.dim
    table = [
        *(rows(f"x_{name}", f"x_{name}", shape=(1, 1, dim)) for name in "rwkvag"),
        *(linear(f"{name}_proj.weight", f"{name}_proj") for name in "rkv"),
        linear("o_proj.weight", "out_proj"),
        *_low_rank("w"),
        *_low_rank("a"),
        *_low_rank("g")[:2],
        rows("k_k", "k_k"),
        rows("k_a", "k_a"),
        rows("r_k", "r_k"),
        rows("g_norm.weight", "norm_scale"),
        rows("g_norm.bias", "norm_bias"),
    ]
    return parts.inside(table, "attn.", "mixer.")


def _low_rank(name: str) -> list[Tensor]:
    return [
        linear(f"{name}_lora.lora.0.weight", f"{name}1"),
        linear(f"{name}_lora.lora.2.weight", f"{name}2"),
        rows(f"{name}_lora.lora.2.bias", f"{name}0"),
    ]


def _channel_mix(dim: int) -> list[Tensor]:
    table = [
        rows("x_k", "x_k"),
        linear("key.weight", "key_proj"),
        linear("value.weight", "value_proj"),
    ]
    return parts.inside(table, "ffn.", "mlp.")


RWKV7_FAMILY = Family(_build, ("model.",))
