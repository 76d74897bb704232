"""Pallas kernels for the hot paths of seqjax, one folder per op. Arrays in, arrays out.

A leaf: it imports jax and nothing of seqjax.
"""
