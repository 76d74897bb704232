"""Recurrences that run in parallel over time, in JAX.

Ops are pure functions of arrays, and return their outputs and the final state:
- `linear_scan`: elementwise linear recurrences, real or complex (LRU, S5).
- `block_scan`: linear recurrences with block-diagonal or dense transitions (LinOSS, LMU).
- `ssm_scan`: diagonal state-space models that are constant in time (S4D, MEGA).
- `selective_scan`: diagonal state-space models with input-dependent transitions (Mamba).
- `linear_attention`: matrix states with decays (GateLoop, RetNet, GLA, Mamba-2).
- `delta_rule`: matrix states with a correction along the key (DeltaNet).
- `generalized_delta_rule`: matrix states with any rank-one correction (RWKV-7).
- `nonlinear_scan`: any RNN cell, by Newton's method or step by step. `Newton` configures the
  solver, `SolveInfo` reports on the solution, and `lyapunov` predicts whether Newton is fast.
- `monoid_scan`: any associative operator.
- `segment_starts`: the `reset` argument of all ops, from the segment ids of packed sequences.

Modules:
- `ops`: the functions above.
- `cells`: cells of nonlinear RNNs, for `nonlinear_scan`.
- `layers`: sequence layers, frozen dataclasses with `init`, `apply`, `step` and `initial_state`.
- `models`: a backbone of any layers, a language model and a classifier.
- `sharding`: meshes, and shardings of parameters, optimizer state and batches.
- `types`: array types of the signatures.

The Flax adapters `seqjax.nnx` and `seqjax.linen` require Flax; import them by name.
"""

from seqjax import cells as cells
from seqjax import layers as layers
from seqjax import models as models
from seqjax import ops as ops
from seqjax import sharding as sharding
from seqjax import types as types
from seqjax.ops import Newton as Newton
from seqjax.ops import SolveInfo as SolveInfo
from seqjax.ops import block_scan as block_scan
from seqjax.ops import delta_rule as delta_rule
from seqjax.ops import generalized_delta_rule as generalized_delta_rule
from seqjax.ops import linear_attention as linear_attention
from seqjax.ops import linear_scan as linear_scan
from seqjax.ops import lyapunov as lyapunov
from seqjax.ops import monoid_scan as monoid_scan
from seqjax.ops import nonlinear_scan as nonlinear_scan
from seqjax.ops import segment_starts as segment_starts
from seqjax.ops import selective_scan as selective_scan
from seqjax.ops import ssm_scan as ssm_scan

__version__ = "0.1.0"  # the only definition; pyproject.toml reads it

__all__ = [
    "Newton",
    "SolveInfo",
    "__version__",
    "block_scan",
    "cells",
    "delta_rule",
    "generalized_delta_rule",
    "layers",
    "linear_attention",
    "linear_scan",
    "lyapunov",
    "models",
    "monoid_scan",
    "nonlinear_scan",
    "ops",
    "segment_starts",
    "selective_scan",
    "sharding",
    "ssm_scan",
    "types",
]
