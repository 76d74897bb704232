"""Families of checkpoints by the `model_type` of their config."""

from collections.abc import Mapping
from types import MappingProxyType

from seqjax.pretrained.families.falcon_h1 import FALCON_H1
from seqjax.pretrained.families.granite import BAMBA, GRANITE
from seqjax.pretrained.families.jamba import JAMBA
from seqjax.pretrained.families.kimi_linear import KIMI_LINEAR
from seqjax.pretrained.families.lfm2 import LFM2
from seqjax.pretrained.families.mamba import FALCON_MAMBA, MAMBA
from seqjax.pretrained.families.mamba2 import MAMBA2
from seqjax.pretrained.families.minimax import MINIMAX
from seqjax.pretrained.families.nemotron_h import NEMOTRON_H
from seqjax.pretrained.families.olmo_hybrid import OLMO_HYBRID
from seqjax.pretrained.families.qwen3_5 import QWEN3_5
from seqjax.pretrained.families.qwen_moe import QWEN3_5_MOE, QWEN3_NEXT
from seqjax.pretrained.families.recurrent_gemma import RECURRENT_GEMMA
from seqjax.pretrained.families.rwkv7 import RWKV7_FAMILY
from seqjax.pretrained.families.zamba import ZAMBA, ZAMBA2
from seqjax.pretrained.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bamba": BAMBA,
        "falcon_h1": FALCON_H1,
        "falcon_mamba": FALCON_MAMBA,
        "granitemoehybrid": GRANITE,
        "jamba": JAMBA,
        "kimi_linear": KIMI_LINEAR,
        "lfm2": LFM2,
        "mamba": MAMBA,
        "mamba2": MAMBA2,
        "minimax": MINIMAX,
        "nemotron_h": NEMOTRON_H,
        "olmo_hybrid": OLMO_HYBRID,
        "qwen3_5": QWEN3_5,
        "qwen3_5_moe": QWEN3_5_MOE,
        "qwen3_5_moe_text": QWEN3_5_MOE,
        "qwen3_5_text": QWEN3_5,
        "qwen3_next": QWEN3_NEXT,
        "recurrent_gemma": RECURRENT_GEMMA,
        "rwkv7": RWKV7_FAMILY,
        "zamba": ZAMBA,
        "zamba2": ZAMBA2,
    }
)
"""The families that `seqjax.pretrained.load` supports."""
