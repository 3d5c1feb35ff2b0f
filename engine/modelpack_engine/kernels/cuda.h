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
// A kernel that is launched early (PTX ISA: griddepcontrol) starts once all blocks of the one before have let
// it, and waits for that kernel's end before it reads what kernels wrote. At least one of its threads must
// always wait: then its own end implies that of the kernels before, for the kernel after it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PA_LET_NEXT_START() asm volatile("griddepcontrol.launch_dependents;")
#define PA_WAIT_FOR_BEFORE() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define PA_LET_NEXT_START()
#define PA_WAIT_FOR_BEFORE()
#endif
