"""Kernels and matmuls of decoder layers: linears, add + RMSNorm, experts, recurrences.

These modules compute; `modelpack_engine.patches` decides which layers of a model use them. Read
`kernels` first, then `matmul`.
"""
