// CUDA's tensor cores, one warp: matmuls of 16x16 with 16x8, and loads in the layout that they need, and what makes their
// operands: arithmetic of pairs of 16 bits.
// (PTX ISA: mma.sync.aligned.m16n8k16, ldmatrix, cp.async; compute capability 8.0 and later.)
__device__ inline void pa_copy16(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void pa_copy16_or_zero(void* to, const void* from, bool there) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
template <int BYTES>
__device__ inline void pa_copy_or_zero(void* to, const void* from, bool there) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(BYTES),
               "r"(there ? BYTES : 0)
               : "memory");
}
template <int LEFT>
__device__ inline void pa_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void pa_copies_commit() { asm volatile("cp.async.commit_group;"); }
__device__ inline void pa_ldmatrix(unsigned (&b)[4], const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared)
               : "memory");
}
__device__ inline void pa_ldmatrix_trans(unsigned (&b)[4], const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared)
               : "memory");
}
template <typename E>
__device__ inline void pa_mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ inline void pa_mma<__nv_bfloat16>(
    float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void pa_mma<__half>(
    float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Bytes of 16 outputs, signed or not, times 8 columns of signed ones: m16n8k32, products of integers.
template <bool SIGNED>
__device__ inline void pa_mma_bytes(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (SIGNED) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
  } else {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
  }
}
template <typename E>
__device__ inline unsigned pa_pack(float x, float y) {
  alignas(4) E both[2] = {E(x), E(y)};
  return *reinterpret_cast<const unsigned*>(both);
}
// (numbers - offsets) * scales + biases, of pairs of __half.
template <typename E>
__device__ inline unsigned pa_affine(unsigned numbers, unsigned offsets, unsigned scales, unsigned biases);
template <>
__device__ inline unsigned pa_affine<__half>(
    unsigned numbers, unsigned offsets, unsigned scales, unsigned biases) {
  unsigned y;
  asm("{.reg .b32 t; sub.rn.f16x2 t, %1, %2; fma.rn.f16x2 %0, t, %3, %4;}"
      : "=r"(y) : "r"(numbers), "r"(offsets), "r"(scales), "r"(biases));
  return y;
}
template <typename E>
__device__ inline unsigned pa_fma2(unsigned x, unsigned y, unsigned z);
template <>
__device__ inline unsigned pa_fma2<__nv_bfloat16>(unsigned x, unsigned y, unsigned z) {
  unsigned found;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(x), "r"(y), "r"(z));
  return found;
}
template <>
__device__ inline unsigned pa_fma2<__half>(unsigned x, unsigned y, unsigned z) {
  unsigned found;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(x), "r"(y), "r"(z));
  return found;
}
// Four of the eight bytes of two words, by the numbers, below 8, in the lowest four nibbles of `numbers`.
__device__ inline unsigned pa_pick_bytes(unsigned first, unsigned second, unsigned numbers) {
  unsigned y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(first), "r"(second), "r"(numbers));
  return y;
}
// (word & mask) | others in one instruction; the compiler takes two.
__device__ inline unsigned pa_masked(unsigned word, unsigned mask, unsigned others) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(word), "r"(mask), "r"(others));
  return y;
}
