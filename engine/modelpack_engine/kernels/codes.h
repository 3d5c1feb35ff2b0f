// Codes of quantised weights as numbers for CUDA's tensor cores.
// Pairs of numbers: OFFSET + code, of which the offset is taken off later.
template <typename E, int BITS>
struct PaCodes {  // __half
  static constexpr int OFFSET = 1024, ONES = 0x3c003c00;
  static __device__ inline unsigned nibbles(unsigned word) { return (word & 0x000f000fu) | 0x64006400u; }
  static __device__ inline unsigned bytes(unsigned word) { return __byte_perm(word, 0x64646464u, 0x4140); }
};
template <int BITS>
struct PaCodes<__nv_bfloat16, BITS> {
  static constexpr int OFFSET = BITS == 4 ? 128 : 0, ONES = 0x3f803f80;
  static __device__ inline unsigned nibbles(unsigned word) { return (word & 0x000f000fu) | 0x43004300u; }
  static __device__ inline unsigned bytes(unsigned word) {  // 2^23 + code, as bits
    const float low = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440)) - 8388608.0f;
    const float high = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7441)) - 8388608.0f;
    return pa_pack<__nv_bfloat16>(low, high);
  }
};
// A pair of a word's codes, and other bits: (0 4) (1 5) (2 6) (3 7), or of 8 bits (0 2) (1 3). Of 4 bits, odd pairs are 16
// times as large.
template <int BITS>
__device__ inline unsigned pa_bits_of_pair(unsigned word, int pair, unsigned others = 0) {
  if (BITS == 4 ? pair >= 2 : pair >= 1) word >>= 8;
  const unsigned mask = BITS == 8 ? 0x00ff00ffu : pair % 2 ? 0x00f000f0u : 0x000f000fu;
  return others ? pa_masked(word, mask, others) : word & mask;
}
// What is multiplied for pairs of codes and pairs of a row's elements: numbers, which stand for the codes, and what
// `rows` makes of the elements. The sum of their products is that of the codes and elements, divided by WHOLE. A pair of
// offsets is the sum of OFFSET_PARTS pairs of bfloat16.
template <typename E, int BITS>
struct PaPairs {  // __half, of which bits 0 to 9 are an integer times 2^-24
  static constexpr float WHOLE = 16777216.0f;
  static constexpr int OFFSET_PARTS = 2;
  static __device__ inline unsigned offsets(unsigned pair, int part) {
    const PaVec<E, 2> both = *(const PaVec<E, 2>*)&pair;
    const float one = float(both.e[0]), other = float(both.e[1]);
    if (part == 0) return pa_pack<__nv_bfloat16>(one, other);
    return pa_pack<__nv_bfloat16>(one - float(__nv_bfloat16(one)), other - float(__nv_bfloat16(other)));
  }
  static __device__ inline unsigned numbers(unsigned word, int pair) {
    return BITS == 8 ? pa_bits_of_pair<8>(word, pair) : word >> pair * 4 & 0x000f000fu;
  }
  static __device__ inline uint4 rows(uint4 pairs) { return pairs; }
};
// Bits 0 to 7 of a bfloat16, if the others are zero, are an integer times 2^-133. Elements of rows are multiplied by
// 2^64, or by 2^60 for codes in bits 4 to 7: rows must be below 2^64, as larger ones would become infinite.
template <int BITS>
struct PaPairs<__nv_bfloat16, BITS> {
  static constexpr float WHOLE = 590295810358705651712.0f;  // 2^69
  static constexpr int OFFSET_PARTS = 1;
  static __device__ inline unsigned offsets(unsigned pair, int) { return pair; }
  static __device__ inline unsigned numbers(unsigned word, int pair) {
    return pa_bits_of_pair<BITS>(word, pair);
  }
  static __device__ inline uint4 rows(uint4 pairs) {
    const unsigned high = BITS == 4 ? 0x5d805d80u : 0x5f805f80u, zero = 0x80008000u;
    return {pa_fma2<__nv_bfloat16>(pairs.x, 0x5f805f80u, zero), pa_fma2<__nv_bfloat16>(pairs.y, high, zero),
            pa_fma2<__nv_bfloat16>(pairs.z, 0x5f805f80u, zero), pa_fma2<__nv_bfloat16>(pairs.w, high, zero)};
  }
};
