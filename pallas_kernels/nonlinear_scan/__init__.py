"""Kernels of nonlinear recurrences: elementwise cells, on TPU also cells with matrices."""

# The maximum size of all matrices [D, D] of a cell together, in float32. The backward kernel for
# TPU keeps the matrices and their cotangents in VMEM.
MATRIX_BYTES = 16 * 2**20
