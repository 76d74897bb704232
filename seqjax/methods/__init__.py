"""Methods around recurrences: training nonlinear cells, and reading a prefix in both directions."""

from seqjax.methods.prefix_linear_attention import (
    prefix_linear_attention as prefix_linear_attention,
)
from seqjax.methods.rtrl import rtrl as rtrl
from seqjax.methods.teacher_forcing import TeacherForced as TeacherForced
from seqjax.methods.teacher_forcing import least_forcing as least_forcing
from seqjax.methods.weight_drop import weight_drop as weight_drop

__all__ = [
    "TeacherForced",
    "least_forcing",
    "prefix_linear_attention",
    "rtrl",
    "weight_drop",
]
