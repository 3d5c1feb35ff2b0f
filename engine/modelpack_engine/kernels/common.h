// Shared by the kernels on every backend: N elements that one load or store moves.
template <typename E, int N>
struct alignas(sizeof(E) * N) PaVec {
  E e[N];
};

#if defined(__CUDACC__)
#define PA_FUNCTION __device__ inline
#define PA_EACH _Pragma("unroll")
PA_FUNCTION float pa_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PA_FUNCTION float pa_float(unsigned int bits) { return __uint_as_float(bits); }
PA_FUNCTION unsigned int pa_bits(float x) { return __float_as_uint(x); }
#elif defined(__METAL_VERSION__)
#define PA_FUNCTION inline
#define PA_EACH _Pragma("clang loop unroll(full)")
PA_FUNCTION float pa_float(unsigned int bits) { return as_type<float>(bits); }
PA_FUNCTION unsigned int pa_bits(float x) { return as_type<unsigned int>(x); }
#else
#define PA_FUNCTION inline
#define PA_EACH
PA_FUNCTION float pa_float(unsigned int bits) { return __builtin_bit_cast(float, bits); }
PA_FUNCTION unsigned int pa_bits(float x) { return __builtin_bit_cast(unsigned int, x); }
#endif

// Floats as integers of the same order, and back; `shift` of their last bits were dropped, as zeros.
PA_FUNCTION unsigned int pa_ordered(float x) {
  const unsigned int bits = pa_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
PA_FUNCTION float pa_unordered(unsigned int order, int shift) {
  const unsigned int bits = order << shift;
  return pa_float(bits >> 31 ? bits & 0x7fffffffu : ~(bits | ((1u << shift) - 1u)));
}

template <int N>
struct PaFloats {
  float e[N];
};

// N elements of a pool: their layout, and their conversion to float. Quantised elements are codes of
// BITS bits in words, lowest bits first; the word of their group has a bias and a scale.
template <typename P, int N, int BITS>
struct PaElements {
  typedef PaVec<P, N * BITS / 32> Packed;
  typedef PaFloats<N> Wide;
  static PA_FUNCTION Wide wide(Packed packed, P group) {
    const float step = pa_float((unsigned int)(group) << 16);
    const float bias = pa_float((unsigned int)(group) & 0xffff0000u);
    Wide found;
    PA_EACH for (int i = 0; i < N; i++) {
      const unsigned int code = (unsigned int)(packed.e[i * BITS / 32]) >> (i * BITS % 32);
      // 2^23 + code, as bits: GPUs convert integers four times slower than they subtract.
      const float whole = pa_float(0x4b000000u | (code & ((1u << BITS) - 1u))) - 8388608.0f;
      found.e[i] = whole * step + bias;
    }
    return found;
  }
};
template <typename P, int N>
struct PaElements<P, N, 0> {
  typedef PaVec<P, N> Packed;
  typedef PaVec<P, N> Wide;
  static PA_FUNCTION Wide wide(Packed packed, P) { return packed; }
};

// 16 bytes of weights of BITS bits (16: of type T), lowest bits first, as floats; codes of 4 bits with OFFSET
// added, which saves a subtraction.
template <typename T, int BITS>
struct PaWeights {
  typedef PaVec<unsigned int, 4> Load;
  enum { COUNT = 128 / BITS, OFFSET = BITS == 4 ? 128 : 0 };
  static PA_FUNCTION float at(Load load, int i) {
    const unsigned int word = load.e[i * BITS / 32];
    if (BITS == 4) return pa_float((word >> (i % 8 * 4) & 15u) << 16 | 0x43000000u);
    // 2^23 + code, as bits
    return pa_float((word >> (i % 4 * 8) & 255u) | 0x4b000000u) - 8388608.0f;
  }
};
template <typename T>
struct PaWeights<T, 16> {
  typedef PaVec<T, 8> Load;
  enum { COUNT = 8, OFFSET = 0 };
  static PA_FUNCTION float at(Load load, int i) { return float(load.e[i]); }
};
