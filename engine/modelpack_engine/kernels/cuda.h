// CUDA: a simdgroup is a warp, a threadgroup a block.
#define PA_LANE int(threadIdx.x & 31)
#define PA_SIMD int(threadIdx.x >> 5)
#define PA_X int(blockIdx.x)
#define PA_Y int(blockIdx.y)
#define PA_Z int(blockIdx.z)
#define PA_DEPTH int(gridDim.z)
#define PA_THREAD int(blockIdx.x * blockDim.x + threadIdx.x)
#define PA_DEVICE
#define PA_SHARED(type, name, n) __shared__ type name[n]
#define PA_SYNC() __syncthreads()
#define PA_XOR(x, mask) __shfl_xor_sync(0xffffffffu, x, mask)
#define PA_EXP2(x) pa_exp2(x)
#define PA_UNROLL _Pragma("unroll")
#define PA_LOG(x) logf(x)
#define PA_RSQRT(x) rsqrtf(x)
#define PA_COS(x) cosf(x)
#define PA_SIN(x) sinf(x)
