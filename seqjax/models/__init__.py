"""Models: a residual backbone for all layers, a language model and a classifier."""

from seqjax.models.backbone import Backbone as Backbone
from seqjax.models.block import Block as Block
from seqjax.models.classifier import Classifier as Classifier
from seqjax.models.language_model import LanguageModel as LanguageModel
from seqjax.models.summary import summary as summary

__all__ = ["Backbone", "Block", "Classifier", "LanguageModel", "summary"]
