// Just enough of Metal for g++ to parse a kernel. Address spaces mean nothing here, but none of
// Metal's own words can serve as a name.
#include <cmath>
#include <cstddef>
#include <cstdint>
#define device
#define constant
#define threadgroup static
#define thread
#define kernel
#define vertex
#define fragment
#define half _Float16
#define bfloat _Float16
#define sampler int
#define vec int
#define __METAL_VERSION__ 310
template <typename To, typename From>
To as_type(From);
typedef unsigned uint;
typedef unsigned short ushort;
typedef _Float16 bfloat16_t;
typedef _Float16 float16_t;
struct uint3 {
  uint x, y, z;
};
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
float simd_shuffle_xor(float, ushort);
namespace metal {
namespace fast {
float exp2(float);
}
namespace precise {
float log(float);
}
}  // namespace metal
