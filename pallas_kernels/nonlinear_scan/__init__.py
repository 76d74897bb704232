"""Kernels of nonlinear recurrences with elementwise cells."""
