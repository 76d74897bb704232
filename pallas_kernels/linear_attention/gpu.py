"""Linear attention on GPU: o_t = scale * S_t^T q_t, S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

`pallas_kernels.gpu.matrix_state` has the equations of a chunk, and the kernel.
"""

import functools

from pallas_kernels.gpu import matrix_state

INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = False, True, True
forward = functools.partial(matrix_state.forward, "linear_attention")
backward = functools.partial(matrix_state.backward, "linear_attention")
