"""Recurrences that run in parallel over time, in JAX.

Ops are pure functions of arrays, and return their outputs and the final state:
- `linear_scan`: elementwise linear recurrences, real or complex (LRU, S5).
- `log_scan`: running maximum or logsumexp with decay (stabilizers, normalizers).
- `block_scan`: linear recurrences with block-diagonal or dense transitions (LinOSS, LMU).
- `ssm_scan`: diagonal state-space models that are constant in time (S4D, MEGA).
- `selective_scan`: diagonal state-space models with input-dependent transitions (Mamba).
- `linear_attention`: matrix states with decays (GateLoop, RetNet, GLA, Mamba-2).
- `delta_rule`: matrix states with a correction along the key (DeltaNet).
- `momentum_delta_rule`: the delta rule with momentum (Titans with a linear memory).
- `generalized_delta_rule`: matrix states with any rank-one correction (RWKV-7).
- `nonlinear_scan`: any RNN cell, by Newton's method or step by step. `Newton` configures the
  solver, `SolveInfo` reports on the solution, and `lyapunov` predicts whether Newton is fast.
- `monoid_scan`: any associative operator.
- `step_scan`: any step, in order.
- `plstm_2d`, `selective_scan_2d`: matrix states and state spaces over a grid, for images.
- `segment_starts`: the `reset` argument of all ops, from the segment ids of packed sequences.
- `default_implementation`: a `with` block in which no op or layer uses a Pallas kernel.

Modules:
- `ops`: the functions above.
- `cells`: cells of nonlinear RNNs, for `nonlinear_scan`.
- `methods`: training of nonlinear cells, and linear attention over a prefix.
- `layers`: sequence layers, frozen dataclasses with `init`, `apply`, `step` and `initial_state`.
- `models`: a backbone of any layers, a language model and a classifier.
- `generation`: `generate`, `stream`, `beam_search` and `speculate` produce tokens from a language
  model; `prefill` and `PrefixCache` read prompts; `save_state` and `load_state` store states. These
  names are also in the package itself.
- `pretrained`: published checkpoints, loaded into a language model and written back.
- `sharding`: meshes, and shardings of parameters, optimizer state and batches.
- `types`: array types of the signatures.

The Flax adapters `seqjax.nnx` and `seqjax.linen` require Flax; import them by name.
"""

from seqjax import cells as cells
from seqjax import generation as generation
from seqjax import layers as layers
from seqjax import methods as methods
from seqjax import models as models
from seqjax import ops as ops
from seqjax import pretrained as pretrained
from seqjax import sharding as sharding
from seqjax import types as types
from seqjax.generation import PrefixCache as PrefixCache
from seqjax.generation import beam_search as beam_search
from seqjax.generation import generate as generate
from seqjax.generation import load_state as load_state
from seqjax.generation import prefill as prefill
from seqjax.generation import save_state as save_state
from seqjax.generation import speculate as speculate
from seqjax.generation import stream as stream
from seqjax.ops import Newton as Newton
from seqjax.ops import SolveInfo as SolveInfo
from seqjax.ops import block_scan as block_scan
from seqjax.ops import default_implementation as default_implementation
from seqjax.ops import delta_rule as delta_rule
from seqjax.ops import generalized_delta_rule as generalized_delta_rule
from seqjax.ops import linear_attention as linear_attention
from seqjax.ops import linear_scan as linear_scan
from seqjax.ops import log_scan as log_scan
from seqjax.ops import lyapunov as lyapunov
from seqjax.ops import momentum_delta_rule as momentum_delta_rule
from seqjax.ops import monoid_scan as monoid_scan
from seqjax.ops import nonlinear_scan as nonlinear_scan
from seqjax.ops import plstm_2d as plstm_2d
from seqjax.ops import segment_starts as segment_starts
from seqjax.ops import selective_scan as selective_scan
from seqjax.ops import selective_scan_2d as selective_scan_2d
from seqjax.ops import ssm_scan as ssm_scan
from seqjax.ops import step_scan as step_scan

__version__ = "0.1.0"  # the only definition; pyproject.toml reads it

__all__ = [
    "Newton",
    "PrefixCache",
    "SolveInfo",
    "__version__",
    "beam_search",
    "block_scan",
    "cells",
    "default_implementation",
    "delta_rule",
    "generalized_delta_rule",
    "generate",
    "generation",
    "layers",
    "linear_attention",
    "linear_scan",
    "load_state",
    "log_scan",
    "lyapunov",
    "methods",
    "models",
    "momentum_delta_rule",
    "monoid_scan",
    "nonlinear_scan",
    "ops",
    "plstm_2d",
    "prefill",
    "pretrained",
    "save_state",
    "segment_starts",
    "selective_scan",
    "selective_scan_2d",
    "sharding",
    "speculate",
    "ssm_scan",
    "step_scan",
    "stream",
    "types",
]
