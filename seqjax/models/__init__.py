"""Models: one residual backbone for all layers, and its heads, in the protocol of a layer."""

from seqjax.models.backbone import Backbone as Backbone
from seqjax.models.block import Block as Block
from seqjax.models.classifier import Classifier as Classifier
from seqjax.models.language_model import LanguageModel as LanguageModel
from seqjax.models.summary import summary as summary

__all__ = ["Backbone", "Block", "Classifier", "LanguageModel", "summary"]
