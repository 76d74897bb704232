"""Generation of tokens: prefill, decoding on the device, beams, speculation, cached prefixes."""

from seqjax.generation.beam import Beams as Beams
from seqjax.generation.beam import beam_search as beam_search
from seqjax.generation.decode import Generation as Generation
from seqjax.generation.decode import generate as generate
from seqjax.generation.decode import stream as stream
from seqjax.generation.prefix_cache import PrefixCache as PrefixCache
from seqjax.generation.prompts import prefill as prefill
from seqjax.generation.sampling import Sampling as Sampling
from seqjax.generation.snapshots import load_state as load_state
from seqjax.generation.snapshots import save_state as save_state
from seqjax.generation.speculation import Speculation as Speculation
from seqjax.generation.speculation import speculate as speculate

__all__ = [
    "Beams",
    "Generation",
    "PrefixCache",
    "Sampling",
    "Speculation",
    "beam_search",
    "generate",
    "load_state",
    "prefill",
    "save_state",
    "speculate",
    "stream",
]
