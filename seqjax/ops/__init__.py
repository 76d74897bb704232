"""Recurrences as pure functions of arrays: no parameters, no modules."""

from seqjax.ops.delta_rule import delta_rule as delta_rule
from seqjax.ops.generalized_delta_rule import generalized_delta_rule as generalized_delta_rule
from seqjax.ops.linear_attention import linear_attention as linear_attention
from seqjax.ops.linear_scan import linear_scan as linear_scan
from seqjax.ops.lyapunov import lyapunov as lyapunov
from seqjax.ops.monoid_scan import monoid_scan as monoid_scan
from seqjax.ops.nonlinear_scan import Newton as Newton
from seqjax.ops.nonlinear_scan import SolveInfo as SolveInfo
from seqjax.ops.nonlinear_scan import nonlinear_scan as nonlinear_scan
from seqjax.ops.segments import segment_starts as segment_starts
from seqjax.ops.selective_scan import selective_scan as selective_scan

__all__ = [
    "Newton",
    "SolveInfo",
    "delta_rule",
    "generalized_delta_rule",
    "linear_attention",
    "linear_scan",
    "lyapunov",
    "monoid_scan",
    "nonlinear_scan",
    "segment_starts",
    "selective_scan",
]
