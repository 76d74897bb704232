"""The delta rule on GPU: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T.

`pallas_kernels.gpu.matrix_state` has the equations of a chunk, and the kernel.
"""

import functools

from pallas_kernels.gpu import matrix_state

INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = False, True, True
forward = functools.partial(matrix_state.forward, "delta_rule")
backward = functools.partial(matrix_state.backward, "delta_rule")
