"""RWKV-4 (arXiv 2305.13048), RWKV-5 and RWKV-6 (2404.05892), with the names of transformers.

The authors' names (`blocks.0.att.` and so on) are also read, from safetensors files.
"""

import functools

from seqjax.layers import RWKV4, RWKV6, RWKVChannelMix
from seqjax.layers._base import Layer
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows

_LETTERS = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}


def _build(config: Config, capacity: int, version: int) -> Architecture:
    del capacity
    dim = config.integer("hidden_size", 4096 if version == 4 else 768)
    for name in ("attention_hidden_size", "dim_att"):
        config.expect(name, dim, default=dim)
    eps = config.number("layer_norm_epsilon", 1e-5, least=0)
    mixer = RWKV4(dim, present_share=True) if version == 4 else _matrix(config, dim, version)
    default = 4 * dim if version == 4 else int(dim * 3.5) // 32 * 32
    mlp = RWKVChannelMix(
        dim,
        version,
        config.integer("intermediate_size", config.get("dim_ffn", default)),
        present_share=version < 6,
    )
    table = [
        *norm("ln1", "mixer_norm", "layer"),
        *norm("ln2", "mlp_norm", "layer"),
        *_renamed(_time_mix(mixer, version), "attention.", "att.", "mixer."),
        *_renamed(_channel_mix(dim, version), "feed_forward.", "ffn.", "mlp."),
    ]
    depth = config.integer("num_hidden_layers", 32 if version == 4 else 24)
    return Architecture(
        blocks=[Block(mixer, mlp, norm="layer", norm_eps=eps)] * depth,
        tables=[table] * depth,
        embedding="@embeddings.weight",
        embedding_aliases=("@emb.weight",),
        final_norm="@ln_out",
        layers="@blocks.{}.",
        vocab_size=config.integer("vocab_size", 50277 if version == 4 else 65536),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="layer",
        norm_eps=1e-5,  # the reference does not read the config here
        model={
            "embedding_scale": 1.0,
            "embedding_norm": "layer",
            "embedding_norm_eps": eps,
        },
        extra=[
            rows(
                f"@blocks.0.pre_ln.{stored}",
                f"embedding_norm.{ours}",
                aliases=[f"@blocks.0.ln0.{stored}"],
            )
            for stored, ours in (("weight", "scale"), ("bias", "bias"))
        ],
        head="head.weight",
    )


def _matrix(config: Config, dim: int, version: int) -> RWKV6:
    """Return the time mixing of version 5 or 6."""
    for name in ("proj_low_rank_dim", "expand_k"):
        if config.has(name):
            raise ValueError(
                f"load: config field `{name}` must be absent, got {config.get(name)!r}; RWKV-6 in"
                " the format of fla-hub is not supported."
            )
    size = config.integer("head_size", 64)
    if dim % size:
        raise ValueError(
            f"load: config field `head_size` must divide hidden_size = {dim}, got {size}."
        )
    large = dim == 4096  # the ranks of the reference
    return RWKV6(
        dim,
        dim // size,
        data_dependent=version == 6,
        mix_rank=config.integer("time_mix_extra_dim", 64 if large else 32),
        decay_rank=config.integer("time_decay_extra_dim", 128 if large else 64),
        norm_eps=1e-5 * parts.positive(config, "head_size_divisor", 8.0) ** 2,
        present_share=version == 5,
    )


def _time_mix(mixer: Layer, version: int) -> list[Tensor]:
    dim = mixer.dim
    if isinstance(mixer, RWKV6):
        matrix = (mixer.heads, mixer.head_dim)
        table = [
            rows("time_decay", "w0", shape=matrix if version == 5 else (1, 1, dim)),
            rows("time_faaaa", "u", aliases=["time_first"]),
            rows("ln_x.weight", "norm_scale"),
            rows("ln_x.bias", "norm_bias"),
        ]
        names = list(_LETTERS)
        table += [linear(f"{name}.weight", f"{letter}_proj") for name, letter in _LETTERS.items()]
        table[-1] = linear("gate.weight", "gate_proj")
    else:
        table = [rows("time_decay", "omega"), rows("time_first", "bonus")]
        names = ["key", "value", "receptance"]
        table += [linear(f"{name}.weight", f"{name}_proj") for name in names]
    table.append(linear("output.weight", "out_proj"))
    if version < 6:
        return table + [_share(name, dim) for name in names]
    for letter in "xwkvrg":
        table.append(rows(f"time_maa_{letter}", f"x_{letter}", shape=(1, 1, dim)))
    low_rank = {"maa_w1": "mix_down", "maa_w2": "mix_up", "decay_w1": "w1", "decay_w2": "w2"}
    return table + [rows(f"time_{stored}", ours) for stored, ours in low_rank.items()]


def _channel_mix(dim: int, version: int) -> list[Tensor]:
    table = [linear(f"{name}.weight", f"{name}_proj") for name in ("key", "value", "receptance")]
    if version < 6:
        return table + [_share(name, dim) for name in ("key", "receptance")]
    return table + [rows(f"time_maa_{c}", f"x_{c}", shape=(1, 1, dim)) for c in "kr"]


def _share(name: str, dim: int) -> Tensor:
    """Return the tensor of a share of the present input."""
    letter = _LETTERS[name]
    aliases = [f"time_mix_{letter}"]
    return rows(f"time_mix_{name}", f"x_{letter}", shape=(1, 1, dim), aliases=aliases)


def _renamed(table: list[Tensor], stored: str, authors: str, ours: str) -> list[Tensor]:
    """Return a table inside a module, with the authors' name of the module as an alias."""
    renamed = []
    for tensor in table:
        aliases = [f"{authors}{name}" for name in (tensor.name, *tensor.aliases)]
        moved = tensor.inside(stored, ours)
        renamed.append(moved.with_aliases(*moved.aliases, *aliases))
    return renamed


_PREFIXES = ("rwkv.", "model.", "")
RWKV4_FAMILY = Family(functools.partial(_build, version=4), _PREFIXES)
RWKV5_FAMILY = Family(functools.partial(_build, version=5), _PREFIXES)
RWKV6_FAMILY = Family(
    functools.partial(_build, version=6),
    _PREFIXES,
    sizes=(
        (
            "time_mix_extra_dim",
            ("@blocks.0.attention.time_maa_w2", "@blocks.0.att.time_maa_w2"),
            1,
        ),
        (
            "time_decay_extra_dim",
            ("@blocks.0.attention.time_decay_w1", "@blocks.0.att.time_decay_w1"),
            1,
        ),
    ),
)
