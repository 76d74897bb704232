"""Kernels of the generalized delta rule."""
