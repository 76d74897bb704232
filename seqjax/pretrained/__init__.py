"""Published checkpoints: load them into a `LanguageModel`, and write them back.

Requires the extra `pretrained`: `pip install -e ".[pretrained]"`.
"""

from seqjax.pretrained.families import FAMILIES as FAMILIES
from seqjax.pretrained.loading import load as load
from seqjax.pretrained.model import PretrainedModel as PretrainedModel
from seqjax.pretrained.saving import save as save

__all__ = ["FAMILIES", "PretrainedModel", "load", "save"]
