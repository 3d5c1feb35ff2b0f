// Metal's words in C++ for OpenCL, whose address spaces clang checks as strictly as Metal's compiler.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define __METAL_VERSION__ 320
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
typedef unsigned char uint8_t;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned int uint32_t;
typedef unsigned long size_t;
typedef half float16_t;
typedef half bfloat16_t;
struct uint3 {
  uint x, y, z;
};
template <typename To, typename From>
To as_type(From value) {
  return __builtin_bit_cast(To, value);
}
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
float simd_shuffle_xor(float, ushort);
namespace metal {
namespace fast {
float exp2(float);
}
namespace precise {
float rsqrt(float);
float log(float);
float cos(float);
float sin(float);
}  // namespace precise
}  // namespace metal
