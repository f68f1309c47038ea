"""Triton kernels of the ops, one file an op; installed as `alignfast.kernels`."""
