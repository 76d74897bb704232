"""Families of checkpoints by the `model_type` of their config."""

from collections.abc import Mapping
from types import MappingProxyType

from seqjax.pretrained.families import mamba
from seqjax.pretrained.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "mamba": mamba.MAMBA,
        "falcon_mamba": mamba.FALCON_MAMBA,
    }
)
"""The families that `seqjax.pretrained.load` supports."""
