// The host: a threadgroup has 32 * n lanes, and shared memory is one array.
#define PA_LANE (emu.thread & 31)
#define PA_SIMD (emu.thread >> 5)
#define PA_X emu.x
#define PA_Y emu.y
#define PA_Z emu.z
#define PA_DEPTH emu.depth
#define PA_THREAD (emu.x * emu.threads + emu.thread)
#define PA_DEVICE
#define PA_SHARED(type, name, n) static type name[n]
#define PA_SYNC() emu.sync()
#define PA_XOR(x, mask) emu.exchange(x, mask)
#define PA_EXP2(x) std::exp2(x)
#define PA_UNROLL
#define PA_LET_NEXT_START()
#define PA_WAIT_FOR_BEFORE()
#define PA_LOG(x) std::log(x)
#define PA_RSQRT(x) (1.0f / std::sqrt(x))
#define PA_COS(x) std::cos(x)
#define PA_SIN(x) std::sin(x)
