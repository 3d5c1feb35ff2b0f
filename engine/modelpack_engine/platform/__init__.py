"""What differs between Metal, CUDA and CPU: devices, allocators, BLAS, environment."""
