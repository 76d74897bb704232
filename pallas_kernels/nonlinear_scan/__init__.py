"""Kernels of nonlinear recurrences: elementwise cells, on TPU also cells with matrices."""
