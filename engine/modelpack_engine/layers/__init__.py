"""Fusion: what mlx-lm's layers do in many kernels, in few. For GPUs.

Handing a kernel to a GPU takes the host longer than the GPU takes to run it, as long as a step has
few rows. So layers that read as Llama's do (`recognise`) run with joint projections (`joint`), one
kernel for rotation and KV write, one for a sum and the norm after it, and one for SwiGLU. Models
keep their classes and their parameters; whatever is not recognised runs as it is.
"""
