// Weights of a group of affine quantised ones as pairs for CUDA's tensor cores: WHOLE times their product is that
// of the weights. The pairs of a word have the codes (0 4) (1 5) (2 6) (3 7), or of 8 bits (0 2) (1 3).
template <typename E, int BITS>
struct PaAffine {  // __half: 1024 + code, or 1024 + 16 codes, as bits
  static constexpr float WHOLE = 1.0f;
  unsigned scales, biases;
  PaAffine() = default;
  __device__ PaAffine(unsigned short scale, unsigned short bias) : scales(scale * 0x10001u), biases(bias * 0x10001u) {}
  __device__ unsigned weights(unsigned word, int pair) const {
    const bool high = BITS == 4 && pair % 2;
    const unsigned numbers = pa_bits_of_pair<BITS>(word, pair, 0x64006400u);
    // 1/16 and -64, or 1 and -1024
    const unsigned codes = pa_fma2<E>(numbers, high ? 0x2c002c00u : 0x3c003c00u, high ? 0xd400d400u : 0xe400e400u);
    return pa_fma2<E>(codes, scales, biases);
  }
};
// Bits 0 to 7 of a bfloat16, if the others are zero, are an integer times 2^-133. Weights are shrunk by 2^32, so that
// the factors that make weights of such numbers are not too large: scales are below 2^27, and biases of less than 2^-94
// lose bits.
template <int BITS>
struct PaAffine<__nv_bfloat16, BITS> {
  static constexpr float WHOLE = 4294967296.0f;
  unsigned scales, scales_of_high, biases;
  PaAffine() = default;
  __device__ PaAffine(unsigned short scale, unsigned short bias) {
    scales = pa_fma2<__nv_bfloat16>(scale * 0x10001u, 0x72007200u, 0x80008000u);          // times 2^101
    scales_of_high = pa_fma2<__nv_bfloat16>(scale * 0x10001u, 0x70007000u, 0x80008000u);  // times 2^97
    biases = pa_fma2<__nv_bfloat16>(bias * 0x10001u, 0x2f802f80u, 0x80008000u);           // times 2^-32
  }
  __device__ unsigned weights(unsigned word, int pair) const {
    const bool high = BITS == 4 && pair % 2;
    return pa_fma2<__nv_bfloat16>(pa_bits_of_pair<BITS>(word, pair), high ? scales_of_high : scales, biases);
  }
};
// The weights of a group, divided by WHOLE: (number - ZERO) * scale + offset, of pairs of codes below 128, of values, or of
// floats whose bits begin at PLACE of a number; for floats, NUMBERS is the bits of exponent of their scales, 8 or 4. The
// caller multiplies scales by GAIN and offsets by LOSS. If ZERO is not 0, it is a power of two, and there is no offset.
enum { PA_CODES, PA_VALUES };
template <typename E, int ZERO, int NUMBERS>
struct PaScaled {  // __half
  static_assert((ZERO & (ZERO - 1)) == 0, "times a scale, it would be rounded");
  // Floats are 2^-14 times as large as they should be. Exact are scales of 2^-22 to 4, and all of 4 bits of exponent.
  static constexpr float WHOLE = NUMBERS == 8 ? 2.0f : NUMBERS == 4 ? 128.0f : 1.0f;
  static constexpr float GAIN = NUMBERS == 8 ? 8192.0f : WHOLE, LOSS = 1.0f;
  static constexpr int PLACE = 9;
  unsigned scales, offsets;
  PaScaled() = default;
  __device__ PaScaled(float scale, float offset) : scales(pa_pack<E>(scale, scale)) {
    offsets = ZERO ? pa_fma2<E>(scales, pa_pack<E>(-ZERO, -ZERO), 0x80008000u) : pa_pack<E>(offset, offset);
  }
  __device__ unsigned weights(unsigned numbers) const {
    if (NUMBERS != PA_CODES) return pa_fma2<E>(numbers, scales, offsets);
    return pa_affine<E>(numbers | 0x64006400u, 0x64006400u, scales, offsets);  // 1024 + code
  }
};
template <int ZERO, int NUMBERS>
struct PaScaled<__nv_bfloat16, ZERO, NUMBERS> {
  static_assert((ZERO & (ZERO - 1)) == 0, "times a scale, it would be rounded");
  static constexpr float WHOLE = PaAffine<__nv_bfloat16, 4>::WHOLE, LOSS = 1.0f / WHOLE;
  // 2^101 for codes, 2^94 for floats, which are 2^-126 times as large as they should be
  static constexpr float GAIN = NUMBERS == PA_VALUES ? LOSS : NUMBERS == PA_CODES ? 2535301200456458802993406410752.0f
                                                                               : 19807040628566084398385987584.0f;
  static constexpr int PLACE = 6;
  unsigned scales, offsets;
  PaScaled() = default;
  __device__ PaScaled(float scale, float offset) : scales(pa_pack<__nv_bfloat16>(scale, scale)) {
    offsets = ZERO ? pa_fma2<__nv_bfloat16>(scales, (0x8000u | ZERO) * 0x10001u, 0x80008000u)
                   : pa_pack<__nv_bfloat16>(offset, offset);
  }
  __device__ unsigned weights(unsigned numbers) const { return pa_fma2<__nv_bfloat16>(numbers, scales, offsets); }
};
