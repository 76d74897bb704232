"""Pallas kernels for seqjax, one folder per op; functions of arrays that import only jax and NumPy.

A module `<op>/tpu.py` or `<op>/gpu.py` has the kernels of an op for one platform. The package of
an op exports what its callers need at trace time. `tpu/` and `gpu/` have the shared parts.
"""
