// Codes of quantised weights as numbers for CUDA's tensor cores.
// Pairs of numbers: OFFSET + code, of which the offset is taken off later.
template <typename E, int BITS>
struct PaCodes {  // __half
  static constexpr int OFFSET = 1024, ONES = 0x3c003c00, OFFSETS = 0x64006400;
  static __device__ inline unsigned nibbles(unsigned word) { return (word & 0x000f000fu) | 0x64006400u; }
  static __device__ inline unsigned bytes(unsigned word) { return __byte_perm(word, 0x64646464u, 0x4140); }
};
template <int BITS>
struct PaCodes<__nv_bfloat16, BITS> {
  static constexpr int OFFSET = BITS == 4 ? 128 : 0, ONES = 0x3f803f80, OFFSETS = 0x43004300;
  static __device__ inline unsigned nibbles(unsigned word) { return (word & 0x000f000fu) | 0x43004300u; }
  static __device__ inline unsigned bytes(unsigned word) {  // 2^23 + code, as bits
    const float low = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440)) - 8388608.0f;
    const float high = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7441)) - 8388608.0f;
    return pa_pack<__nv_bfloat16>(low, high);
  }
};
