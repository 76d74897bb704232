"""Published checkpoints: load them into a `LanguageModel`, and write them back.

Requires the extra `pretrained`: `pip install -e ".[pretrained]"`.
"""

from seqjax.pretrained.checkpoint import PretrainedModel as PretrainedModel
from seqjax.pretrained.checkpoint import load as load
from seqjax.pretrained.checkpoint import save as save
from seqjax.pretrained.families import FAMILIES as FAMILIES

__all__ = ["FAMILIES", "PretrainedModel", "load", "save"]
