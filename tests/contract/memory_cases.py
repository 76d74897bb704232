"""Rows of the layers whose memories learn at test time, in mini-batches shorter than the input."""

import functools

import seqjax
from tests.contract.layer_case import layer_case
from tests.oracles import memory_oracles

_TTT = functools.partial(layer_case, oracle=memory_oracles.ttt)

# Five steps of Newton-Schulz multiply small singular values by up to 3.4445^5 = 485, and so the
# steps of the central differences of the tests. Two steps keep these accurate. `test_memories.py`
# has the default of five.
_ATLAS = layer_case(seqjax.layers.Atlas(dim=6, heads=2, window=3, steps=2), memory_oracles.atlas)

# Four features per head: with two, a layer norm is nearly a sign.
MEMORIES = [
    _TTT(seqjax.layers.TTTLinear(dim=8, heads=2, mini_batch=4)),
    _TTT(seqjax.layers.TTTLinear(dim=4, heads=1, mini_batch=16), name="TTTLinear-16"),
    _TTT(seqjax.layers.TTTMLP(dim=8, heads=2, mini_batch=3, expand=2)),
    layer_case(seqjax.layers.Titans(dim=8, heads=2, mini_batch=4), memory_oracles.titans),
    layer_case(
        seqjax.layers.Titans(dim=8, heads=2, mini_batch=3, hidden=6, base_rate=0.2),
        memory_oracles.titans,
        "Titans-hidden",
    ),
    _ATLAS,
    layer_case(
        seqjax.layers.Atlas(dim=4, heads=1, window=5, degree=1, steps=0),
        memory_oracles.atlas,
        "Atlas-linear",
    ),
    layer_case(
        seqjax.layers.BlockRecurrent(dim=4, heads=2, window=4, states=3),
        memory_oracles.block_recurrent,
    ),
]
