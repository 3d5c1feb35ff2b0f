// CUDA: matmuls of a warpgroup's 64 rows, in registers or shared memory, with a matrix in
// shared memory. (PTX ISA: wgmma.mma_async, compute capability 9.0a.)
template <int N>
struct PaNumber {
  static constexpr int VALUE = N;
};
// The descriptor of a [rows, 64] matrix in shared memory, of 128 bytes a row, whose 16-byte chunks are
// exchanged: chunk ^ row % 8.
__device__ inline unsigned long long pa_matrix(const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  return (unsigned long long)(shared >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// That of a matrix so many bytes after another one.
__device__ inline unsigned long long pa_matrix_after(unsigned long long matrix, unsigned bytes) {
  return (matrix & 0xffffffff00000000ull) | ((unsigned)matrix + (bytes >> 4));
}
#define PA_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PA_16(n) PA_4(n), PA_4(n + 1), PA_4(n + 2), PA_4(n + 3)
#define PA_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PA_R32 PA_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PA_R64 PA_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PA_BY(type, n, sums, operands, a0, a1, a2, a3, b) \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" sums "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p, 1, 1, 0;}" \
               : operands : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix))
#define PA_OPERANDS32 PA_16(0), PA_16(4)
#define PA_OPERANDS64 PA_16(0), PA_16(4), PA_16(8), PA_16(12)
// Add the product of a warpgroup's 64 rows a [16 in each warp, 16] and a matrix of 8 * N rows [8 N, 16].
template <typename E, int N>
__device__ inline void pa_wgmma(float (&d)[N][4], const unsigned (&a)[4], unsigned long long matrix) {
  if constexpr (PaCodes<E, 4>::OFFSET == 1024) {
    if constexpr (N == 4) PA_BY("f16", "32", PA_R16, PA_16(0), "%16", "%17", "%18", "%19", "%20");
    if constexpr (N == 8) PA_BY("f16", "64", PA_R32, PA_OPERANDS32, "%32", "%33", "%34", "%35", "%36");
    if constexpr (N == 16) PA_BY("f16", "128", PA_R64, PA_OPERANDS64, "%64", "%65", "%66", "%67", "%68");
  } else {
    if constexpr (N == 4) PA_BY("bf16", "32", PA_R16, PA_16(0), "%16", "%17", "%18", "%19", "%20");
    if constexpr (N == 8) PA_BY("bf16", "64", PA_R32, PA_OPERANDS32, "%32", "%33", "%34", "%35", "%36");
    if constexpr (N == 16) PA_BY("bf16", "128", PA_R64, PA_OPERANDS64, "%64", "%65", "%66", "%67", "%68");
  }
}
// The same with the 64 rows a [64, 16] in shared memory, too.
#define PA_BOTH(type, n, sums, operands, a, b) \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" sums "}, " a ", " b ", p, 1, 1, 0, 0;}" : operands : "l"(rows), "l"(matrix))
template <typename E, int N, int TILES>
__device__ inline void pa_wgmma_shared(
    float (&d)[TILES][4], unsigned long long rows, unsigned long long matrix) {
  if constexpr (PaCodes<E, 4>::OFFSET == 1024) {
    if constexpr (N == 4) PA_BOTH("f16", "32", PA_R16, PA_16(0), "%16", "%17");
    if constexpr (N == 8) PA_BOTH("f16", "64", PA_R32, PA_OPERANDS32, "%32", "%33");
    if constexpr (N == 16) PA_BOTH("f16", "128", PA_R64, PA_OPERANDS64, "%64", "%65");
  } else {
    if constexpr (N == 4) PA_BOTH("bf16", "32", PA_R16, PA_16(0), "%16", "%17");
    if constexpr (N == 8) PA_BOTH("bf16", "64", PA_R32, PA_OPERANDS32, "%32", "%33");
    if constexpr (N == 16) PA_BOTH("bf16", "128", PA_R64, PA_OPERANDS64, "%64", "%65");
  }
}
template <int LEFT = 0>
__device__ inline void pa_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void pa_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void pa_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void pa_async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// After the last wait: the compiler moves no use of the sums before it.
template <int TILES>
__device__ inline void pa_wgmma_sums(float (&d)[TILES][4]) {
  PA_EACH for (int i = 0; i < TILES * 4; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
