"""Published checkpoints: load them into a `LanguageModel`, and write them back.

Requires the extra `pretrained`: `pip install -e ".[pretrained]"`.
"""

from seqjax.pretrained.families import FAMILIES as FAMILIES
from seqjax.pretrained.loading import abstract_params as abstract_params
from seqjax.pretrained.loading import load as load
from seqjax.pretrained.loading import read_model as read_model
from seqjax.pretrained.lora import LoRA as LoRA
from seqjax.pretrained.model import PretrainedModel as PretrainedModel
from seqjax.pretrained.saving import save as save

__all__ = [
    "FAMILIES",
    "LoRA",
    "PretrainedModel",
    "abstract_params",
    "load",
    "read_model",
    "save",
]
