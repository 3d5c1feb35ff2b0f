// Just enough of CUDA for g++ to parse a kernel.
#include <cmath>
#include <cstddef>
#define __CUDACC__
#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static
#define asm(...) (void)x, y = 0.0f
struct Narrow {  // like CUDA's own types: converts explicitly from float
  unsigned short bits;
  Narrow() = default;
  explicit Narrow(float);
  explicit operator float() const;
};
typedef Narrow bfloat16_t;
typedef Narrow float16_t;
struct Dim {
  unsigned x, y, z;
};
extern Dim threadIdx, blockIdx, blockDim, gridDim;
struct Shape {
  int sizes[10];
  int operator[](int) const;
};
void __syncthreads();
float __shfl_xor_sync(unsigned, float, int);
#include <cstdint>
float __uint_as_float(unsigned);
unsigned __float_as_uint(float);
