"""Linear attention on GPU: o_t = scale * S_t^T q_t, S_t = exp(g_t) S_{t-1} + k_t v_t^T.

`pallas_kernels.gpu.matrix_state` has the equations of a chunk, and the kernel.
"""

import functools

from pallas_kernels.gpu import matrix_state

SHARED_HEADS = True  # in the forward pass, heads may share queries and keys
RECOMPUTES_STATES = True  # the backward pass takes the initial state, not the states

forward = functools.partial(matrix_state.forward, "linear_attention")
backward = functools.partial(matrix_state.backward, "linear_attention")
