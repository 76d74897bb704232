"""The generalized delta rule on GPU: S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T.

`pallas_kernels.gpu.matrix_state` has the equations of a chunk, and the kernel.
"""

import functools

from pallas_kernels.gpu import matrix_state

INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = False, False, True
forward = functools.partial(matrix_state.forward, "generalized_delta_rule")
backward = functools.partial(matrix_state.backward, "generalized_delta_rule")
