// CUDA's blocks, copies and tensor cores on the host: what tensor_cores.h and warpgroups.h declare.
typedef bfloat16_t __nv_bfloat16;
typedef float16_t __half;
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Dim {
  int x, y, z;
};
alignas(1024) unsigned char pa_memory[232448];
#define __device__
#define __shared__
#define __align__(n)
#define threadIdx (Dim{emu.thread, 0, 0})
#define blockIdx (Dim{emu.x, emu.y, emu.z})
#define gridDim (Dim{0, 0, emu.depth})
inline void __syncthreads() { pa_emu->sync(); }
inline float __uint_as_float(unsigned bits) { return pa_float(bits); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned found = 0;
  for (int i = 0; i < 4; i++) found |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
template <int SIZE>
void pa_copy_or_zero(void* to, const void* from, bool there) {
  if (size_t(from) % SIZE || size_t(to) % SIZE) std::abort();
  if (there) std::memcpy(to, from, SIZE);
  else std::memset(to, 0, SIZE);
}
inline void pa_copy16_or_zero(void* to, const void* from, bool there) { pa_copy_or_zero<16>(to, from, there); }
inline void pa_copy16(void* to, const void* from) { pa_copy_or_zero<16>(to, from, true); }
inline void pa_copies_commit() {}
template <int LEFT>
void pa_copies_wait() { static_assert(LEFT >= 0); }
template <typename E>
unsigned pa_pack(float x, float y) {
  const E both[2] = {E(x), E(y)};
  unsigned found;
  std::memcpy(&found, both, 4);
  return found;
}
template <typename E>
float pa_half_of(unsigned pair, int i) {
  E both[2];
  std::memcpy(both, &pair, 4);
  return float(both[i]);
}
template <typename E>
unsigned pa_affine(unsigned numbers, unsigned offsets, unsigned scales, unsigned biases) {
  float y[2];
  for (int i = 0; i < 2; i++) {
    y[i] = (pa_half_of<E>(numbers, i) - pa_half_of<E>(offsets, i)) * pa_half_of<E>(scales, i) + pa_half_of<E>(biases, i);
  }
  return pa_pack<E>(y[0], y[1]);
}
template <typename E>
unsigned pa_fma2(unsigned x, unsigned y, unsigned z) {
  float found[2];
  for (int i = 0; i < 2; i++) found[i] = pa_half_of<E>(x, i) * pa_half_of<E>(y, i) + pa_half_of<E>(z, i);
  return pa_pack<E>(found[0], found[1]);
}
// A warp's registers, which its lanes show each other.
unsigned pa_shown[32][32][6];
// Show a lane's operands, and return those of all lanes.
const unsigned (*pa_show(const unsigned (&a)[4], unsigned b0, unsigned b1))[6] {
  auto* lanes = pa_shown[pa_emu->thread / 32];
  unsigned* own = lanes[pa_emu->thread & 31];
  std::memcpy(own, a, 16), own[4] = b0, own[5] = b1;
  pa_emu->simd->barrier.wait();
  return lanes;
}
template <typename Element>  // of the matrix b, at k and n
void pa_multiply(float (&d)[4], const unsigned (*lanes)[6], float (*a)(unsigned, int), Element b) {
  const int r = (pa_emu->thread & 31) / 4, c = pa_emu->thread % 4;
  for (int i = 0; i < 4; i++) {
    const int row = r + i / 2 * 8, n = c * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      d[i] += a(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) * b(k, n);
    }
  }
}
template <typename E>
void pa_mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const auto* lanes = pa_show(a, b0, b1);
  pa_multiply(d, lanes, pa_half_of<E>, [&](int k, int n) {
    return pa_half_of<E>(lanes[n * 4 + k % 8 / 2][4 + k / 8], k % 2);
  });
  pa_emu->simd->barrier.wait();
}
template <bool SIGNED>
void pa_mma_bytes(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const auto* lanes = pa_show(a, b0, b1);
  const int r = (pa_emu->thread & 31) / 4, c = pa_emu->thread % 4;
  for (int i = 0; i < 4; i++) {
    const int row = r + i / 2 * 8, n = c * 2 + i % 2;
    d[i] = 0;
    for (int k = 0; k < 32; k++) {
      const unsigned x = lanes[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2] >> k % 4 * 8 & 255;
      const int y = (signed char)(lanes[n * 4 + k % 16 / 4][4 + k / 16] >> k % 4 * 8);
      d[i] += (SIGNED ? (signed char)(x) : int(x)) * y;
    }
  }
  pa_emu->simd->barrier.wait();
}
// A barrier counts the arrivals and bytes that are to come, and turns when there are none.
struct PaBarrier {
  short arrivals, missing;
  int bytes : 31;
  unsigned turn : 1;
};
static_assert(sizeof(PaBarrier) == 8);
#ifdef PA_THREADS
#include <sched.h>
pthread_mutex_t pa_barriers = PTHREAD_MUTEX_INITIALIZER;
inline void pa_lock() { pthread_mutex_lock(&pa_barriers); }
inline void pa_unlock() { pthread_mutex_unlock(&pa_barriers); }
inline void pa_let_others_run() { sched_yield(); }
#else
inline void pa_lock() {}
inline void pa_unlock() {}
inline void pa_let_others_run() { let_others_run(); }
#endif
inline void pa_barrier_count(PaBarrier* barrier, int arrivals, int bytes) {
  pa_lock();
  barrier->missing -= arrivals;
  barrier->bytes += bytes;
  if (barrier->missing < 0) std::abort();
  if (barrier->missing == 0 && barrier->bytes == 0) barrier->turn ^= 1, barrier->missing = barrier->arrivals;
  pa_unlock();
}
inline void pa_barrier_make(PaBarrier* barrier, int arrivals) {
  if (size_t(barrier) % 8) std::abort();
  barrier->arrivals = barrier->missing = arrivals, barrier->bytes = 0, barrier->turn = 0;
}
inline void pa_barriers_made() {}
inline void pa_barrier_expect(PaBarrier* barrier, int bytes) { pa_barrier_count(barrier, 1, bytes); }
inline void pa_barrier_arrive(PaBarrier* barrier) { pa_barrier_count(barrier, 1, 0); }
inline void pa_barrier_wait(PaBarrier* barrier, int parity) {
  for (bool done = false; !done;) {
    pa_lock();
    done = int(barrier->turn) != parity;
    pa_unlock();
    if (!done) pa_let_others_run();
  }
}
inline void pa_bulk_copy(void* to, const void* from, int bytes, PaBarrier* barrier) {
  if (size_t(from) % 16 || size_t(to) % 16 || bytes % 16 || bytes <= 0) std::abort();
  std::memcpy(to, from, bytes);
  pa_barrier_count(barrier, 0, -bytes);
}
inline void pa_barrier_arrive_after_copies(PaBarrier* barrier) { pa_barrier_arrive(barrier); }
template <int THREADS>
void pa_sync_first() {
  static Barrier barrier(THREADS);
  barrier.wait();
}
inline void pa_sync_warp() { pa_emu->simd->barrier.wait(); }
inline unsigned pa_pick_bytes(unsigned first, unsigned second, unsigned numbers) {
  for (int i = 0; i < 4; i++) if (numbers >> 4 * i & 8) std::abort();
  return __byte_perm(first, second, numbers);
}
inline unsigned pa_masked(unsigned word, unsigned mask, unsigned others) { return (word & mask) | others; }
// Four matrices of 8x8 elements, of which each lane shows a line; transposed, a lane gets pairs of a column.
const uint16_t* pa_lines[8][32];
inline void pa_load_matrices(unsigned (&b)[4], const void* from, bool transposed) {
  if (size_t(from) % 16) std::abort();
  auto* lines = pa_lines[pa_emu->thread / 32];
  const int r = (pa_emu->thread & 31) / 4, c = pa_emu->thread % 4 * 2;
  lines[pa_emu->thread & 31] = (const uint16_t*)from;
  pa_emu->simd->barrier.wait();
  for (int i = 0; i < 4; i++) {
    const auto* of = lines + i * 8;
    b[i] = transposed ? of[c][r] | unsigned(of[c + 1][r]) << 16 : of[r][c] | unsigned(of[r][c + 1]) << 16;
  }
  pa_emu->simd->barrier.wait();
}
inline void pa_ldmatrix(unsigned (&b)[4], const void* from) { pa_load_matrices(b, from, false); }
inline void pa_ldmatrix_trans(unsigned (&b)[4], const void* from) { pa_load_matrices(b, from, true); }
inline unsigned long long pa_matrix(const void* from) { return (const unsigned char*)from - pa_memory; }
inline unsigned long long pa_matrix_after(unsigned long long matrix, unsigned bytes) { return matrix + bytes; }
template <int N>
struct PaNumber {
  static constexpr int VALUE = N;
};
// Two elements, at an even k, of a line of a matrix.
inline unsigned pa_pair_of(unsigned long long matrix, int line, int k) {
  size_t at = matrix + line * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  unsigned found;
  std::memcpy(&found, pa_memory + at, 4);
  return found;
}
template <typename E, int N, int TILES>
void pa_wgmma(float (&d)[TILES][4], const unsigned (&a)[4], unsigned long long matrix) {
  auto* lanes = pa_shown[pa_emu->thread / 32];
  std::memcpy(lanes[pa_emu->thread & 31], a, 16);
  pa_emu->simd->barrier.wait();
  for (int tile = 0; tile < N; tile++) {
    pa_multiply(d[tile], lanes, pa_half_of<E>, [&](int k, int n) {
      return pa_half_of<E>(pa_pair_of(matrix, tile * 8 + n, k / 2 * 2), k % 2);
    });
  }
  pa_emu->simd->barrier.wait();
}
template <typename E, int N, int TILES>
void pa_wgmma_shared(float (&d)[TILES][4], unsigned long long rows, unsigned long long matrix) {
  const int line = pa_emu->thread % 128 / 32 * 16 + pa_emu->thread % 32 / 4, k = pa_emu->thread % 4 * 2;
  const unsigned a[4] = {pa_pair_of(rows, line, k), pa_pair_of(rows, line + 8, k),
                         pa_pair_of(rows, line, k + 8), pa_pair_of(rows, line + 8, k + 8)};
  pa_wgmma<E, N>(d, a, matrix);
}
template <int LEFT = 0>
void pa_wgmma_wait() {}
inline void pa_wgmma_commit() {}
inline void pa_wgmma_fence() {}
inline void pa_async_fence() {}
template <int TILES>
void pa_wgmma_sums(float (&)[TILES][4]) {}
