"""seqjax: recurrences that run in parallel over time."""

from seqjax import cells as cells
from seqjax import layers as layers
from seqjax import models as models
from seqjax import sharding as sharding
from seqjax.ops import Newton as Newton
from seqjax.ops import SolveInfo as SolveInfo
from seqjax.ops import delta_rule as delta_rule
from seqjax.ops import generalized_delta_rule as generalized_delta_rule
from seqjax.ops import linear_attention as linear_attention
from seqjax.ops import linear_scan as linear_scan
from seqjax.ops import lyapunov as lyapunov
from seqjax.ops import monoid_scan as monoid_scan
from seqjax.ops import nonlinear_scan as nonlinear_scan
from seqjax.ops import segment_starts as segment_starts
from seqjax.ops import selective_scan as selective_scan

__version__ = "0.1.0"
