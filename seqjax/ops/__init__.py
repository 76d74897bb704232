"""Recurrences as pure functions of arrays: no parameters, no modules."""

from seqjax.ops.core.backends import default_implementation as default_implementation
from seqjax.ops.core.custom_adjoint import custom_adjoint as custom_adjoint
from seqjax.ops.core.residual_names import CHECKPOINT_NAMES as CHECKPOINT_NAMES
from seqjax.ops.elementwise.block_scan import block_scan as block_scan
from seqjax.ops.elementwise.linear_scan import linear_scan as linear_scan
from seqjax.ops.elementwise.log_scan import log_scan as log_scan
from seqjax.ops.elementwise.selective_scan import selective_scan as selective_scan
from seqjax.ops.elementwise.ssm_scan import ssm_scan as ssm_scan
from seqjax.ops.grid.plstm_2d import plstm_2d as plstm_2d
from seqjax.ops.grid.selective_scan_2d import selective_scan_2d as selective_scan_2d
from seqjax.ops.matrix_state.chunked import ChunkMap as ChunkMap
from seqjax.ops.matrix_state.decays import cumulative_decays as cumulative_decays
from seqjax.ops.matrix_state.decays import decayed_products as decayed_products
from seqjax.ops.matrix_state.delta_rule import delta_rule as delta_rule
from seqjax.ops.matrix_state.generalized_delta_rule import (
    generalized_delta_rule as generalized_delta_rule,
)
from seqjax.ops.matrix_state.input_maps import SoftplusGate as SoftplusGate
from seqjax.ops.matrix_state.linear_attention import linear_attention as linear_attention
from seqjax.ops.matrix_state.momentum_delta_rule import momentum_delta_rule as momentum_delta_rule
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence as MatrixRecurrence
from seqjax.ops.monoid_scan import monoid_scan as monoid_scan
from seqjax.ops.nonlinear.lyapunov import lyapunov as lyapunov
from seqjax.ops.nonlinear.nonlinear_scan import Newton as Newton
from seqjax.ops.nonlinear.nonlinear_scan import SolveInfo as SolveInfo
from seqjax.ops.nonlinear.nonlinear_scan import nonlinear_scan as nonlinear_scan
from seqjax.ops.previous import previous as previous
from seqjax.ops.segments import segment_starts as segment_starts
from seqjax.ops.step_scan import step_scan as step_scan

__all__ = [
    "CHECKPOINT_NAMES",
    "ChunkMap",
    "MatrixRecurrence",
    "Newton",
    "SoftplusGate",
    "SolveInfo",
    "block_scan",
    "cumulative_decays",
    "custom_adjoint",
    "decayed_products",
    "default_implementation",
    "delta_rule",
    "generalized_delta_rule",
    "linear_attention",
    "linear_scan",
    "log_scan",
    "lyapunov",
    "momentum_delta_rule",
    "monoid_scan",
    "nonlinear_scan",
    "plstm_2d",
    "previous",
    "segment_starts",
    "selective_scan",
    "selective_scan_2d",
    "ssm_scan",
    "step_scan",
]
