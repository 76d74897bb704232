"""Gated elementwise recurrences as float64 NumPy loops, written from the papers' equations.

The functions take `(layer, params, x, reset=None)` as those of `layer_oracles` do. Nothing here
comes from seqjax.
"""

import numpy as np

from tests.oracles.layer_oracles import _f64, _resets


def token_shift(layer, params, x, reset=None):
    """mix x_t + (1 - mix) x_{t-1}, with zero before the start and at resets (arXiv 2305.13048)."""
    p, x, reset = _f64(params), _f64(x), _resets(x, reset)
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        previous = np.zeros(layer.dim) if t == 0 or reset[b, t] else x[b, t - 1]
        y[b, t] = p["mix"] * x[b, t] + (1 - p["mix"]) * previous
    return y
