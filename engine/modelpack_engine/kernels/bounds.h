// MLX declares kernels without the most threads of a block, for which NVIDIA's compilers (13.0 and 13.5 differ) may
// then give a thread too many registers: such a kernel is not launched. Those of strips.h have 608 threads at most.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(608)
