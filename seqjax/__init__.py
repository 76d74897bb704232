from seqjax import layers as layers, models as models
from seqjax.ops import (
    delta_rule as delta_rule,
    linear_attention as linear_attention,
    linear_scan as linear_scan,
    monoid_scan as monoid_scan,
    segment_starts as segment_starts,
    selective_scan as selective_scan,
)
