"""Methods around recurrences: training of cells, attention over a prefix, limits of states."""

from seqjax.methods.prefix_linear_attention import (
    prefix_linear_attention as prefix_linear_attention,
)
from seqjax.methods.rtrl import rtrl as rtrl
from seqjax.methods.teacher_forcing import TeacherForced as TeacherForced
from seqjax.methods.teacher_forcing import jacobian_norms as jacobian_norms
from seqjax.methods.teacher_forcing import least_forcing as least_forcing
from seqjax.methods.weight_drop import weight_drop as weight_drop
from seqjax.ops.matrix_state.state_limits import StateNorm as StateNorm
from seqjax.ops.matrix_state.state_limits import StateWindow as StateWindow

__all__ = [
    "StateNorm",
    "StateWindow",
    "TeacherForced",
    "jacobian_norms",
    "least_forcing",
    "prefix_linear_attention",
    "rtrl",
    "weight_drop",
]
