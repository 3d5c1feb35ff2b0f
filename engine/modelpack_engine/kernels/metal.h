// Metal: a simdgroup is 32 lanes. MLX passes the thread attributes that it finds named here.
#define PA_LANE int(thread_index_in_simdgroup)
#define PA_SIMD int(simdgroup_index_in_threadgroup)
#define PA_X int(threadgroup_position_in_grid.x)
#define PA_Y int(threadgroup_position_in_grid.y)
#define PA_Z int(threadgroup_position_in_grid.z)
#define PA_DEPTH int(threadgroups_per_grid.z)
#define PA_THREAD int(thread_position_in_grid.x)
#define PA_DEVICE device
#define PA_SHARED(type, name, n) threadgroup type name[n]
#define PA_SYNC() threadgroup_barrier(mem_flags::mem_threadgroup)
#define PA_XOR(x, mask) simd_shuffle_xor(x, ushort(mask))
#define PA_EXP2(x) metal::fast::exp2(x)
#define PA_UNROLL _Pragma("clang loop unroll(full)")
#define PA_LOG(x) metal::precise::log(x)
#define PA_RSQRT(x) metal::precise::rsqrt(x)
#define PA_COS(x) metal::precise::cos(x)
#define PA_SIN(x) metal::precise::sin(x)
