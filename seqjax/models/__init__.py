"""Models: one residual backbone for all layers, and its heads, in the protocol of a layer."""

from seqjax.models.backbone import Backbone as Backbone
from seqjax.models.backbone import Block as Block
from seqjax.models.classifier import Classifier as Classifier
from seqjax.models.language_model import LanguageModel as LanguageModel

__all__ = ["Backbone", "Block", "Classifier", "LanguageModel"]
