"""The differences between Metal, CUDA and CPU: devices, memory, BLAS, environment variables."""
