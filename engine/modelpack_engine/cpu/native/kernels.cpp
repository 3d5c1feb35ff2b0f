// The kernels, compiled once for each instruction set: MODELPACK_ISA names the function that
// returns them. Vectors are those of GCC and Clang; only dot products and conversions of halves
// need intrinsics.
#include "kernels.hpp"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace modelpack {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

#define INLINE inline __attribute__((always_inline))

template <class V> INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
INLINE f32x16 splat(float x) { return f32x16{} + x; }
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

INLINE f32x16 load_half(const void* from) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    f32x16 v;
    ((__m256*)&v)[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    ((__m256*)&v)[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + 1));
    return v;
#else
    f32x16 v;
    for (int i = 0; i < 16; i++) {
        uint16_t h;
        std::memcpy(&h, (const uint8_t*)from + 2 * i, 2);
        uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, part = h & 1023;
        float f;
        if (exponent == 0) {
            f = part * 5.9604644775390625e-8f;  // 2^-24
        } else {
            uint32_t bits = exponent == 31 ? 0x7f800000u | part << 13 : (exponent + 112) << 23 | part << 13;
            std::memcpy(&f, &bits, 4);
        }
        v[i] = sign ? -f : f;
    }
    return v;
#endif
}

INLINE f32x16 load_bfloat16(const void* from) {
    typedef uint16_t u16x16 __attribute__((vector_size(32)));
    return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

// acc + the four products of unsigned bytes of w and signed bytes of x in each lane.
INLINE i32x16 dot(i32x16 acc, u8x64 w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    const __m256i b = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(127);
    __m256i* a = (__m256i*)&acc;
    const __m256i* v = (const __m256i*)&w;
    for (int i = 0; i < 2; i++) {  // two sums, since that of bytes above 127 could overflow 16 bits
        const __m256i small = _mm256_maddubs_epi16(_mm256_and_si256(v[i], low), b);
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(v[i], 7), _mm256_set1_epi8(1));
        const __m256i large = _mm256_maddubs_epi16(top, b);
        a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(small, ones));
        a[i] = _mm256_add_epi32(a[i], _mm256_slli_epi32(_mm256_madd_epi16(large, ones), 7));
    }
    return acc;
#else
    int8_t b[4];
    std::memcpy(b, &x, 4);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) acc[i] += (int32_t)w[4 * i + j] * b[j];
    return acc;
#endif
}

INLINE int32_t four(const int8_t* from) { return load<int32_t>(from); }

// ---- Weights in codes ---------------------------------------------------------------------------

struct Int4 {
    static constexpr int bytes = 320, scales = 256;
    static INLINE void codes(const uint8_t* group, u8x64 (&c)[8]) {
        for (int s = 0; s < 4; s++) {
            const u32x16 v = load<u32x16>(group + 64 * s);
            c[s] = (u8x64)(v & 0x0f0f0f0f);
            c[s + 4] = (u8x64)(v >> 4 & 0x0f0f0f0f);
        }
    }
};
struct Int6 {
    static constexpr int bytes = 448, scales = 384;
    static INLINE void codes(const uint8_t* group, u8x64 (&c)[8]) {
        for (int s = 0; s < 4; s++) {
            const u32x16 v = load<u32x16>(group + 64 * s);
            c[s] = (u8x64)(v & 0x0f0f0f0f);
            c[s + 4] = (u8x64)(v >> 4 & 0x0f0f0f0f);
        }
        for (int h = 0; h < 2; h++) {
            const u32x16 v = load<u32x16>(group + 256 + 64 * h);
            for (int i = 0; i < 4; i++)
                c[4 * h + i] |= (u8x64)((v >> 2 * i & 0x03030303) << 4);
        }
    }
};
struct Int8 {
    static constexpr int bytes = 544, scales = 512;
    static INLINE void codes(const uint8_t* group, u8x64 (&c)[8]) {
        for (int s = 0; s < 8; s++) c[s] = load<u8x64>(group + 64 * s);
    }
};

// MR rows of activations times NT tiles. With `unpacked`, codes come from there, 512 bytes a group.
template <class W, int MR, int NT>
INLINE void multiply_codes(const uint8_t* const (&tiles)[NT], const uint8_t* const (&unpacked)[NT],
                           bool is_unpacked, const Rows& x, int row, float* out, int stride) {
    const int groups = x.columns / kGroup;
    f32x16 sum[MR][NT];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) sum[m][n] = f32x16{};
    const int8_t* codes = x.codes + (size_t)row * x.columns;
    const float* scales = x.scales + (size_t)row * groups;
    const float* sums = x.sums + (size_t)row * groups * 2;
    for (int g = 0; g < groups; g++) {
        for (int n = 0; n < NT; n++) {
            const uint8_t* group = tiles[n] + (size_t)g * W::bytes;
            u8x64 c[8];
            if (is_unpacked)
                for (int s = 0; s < 8; s++) c[s] = load<u8x64>(unpacked[n] + (size_t)g * 512 + 64 * s);
            else
                W::codes(group, c);
            const f32x16 scale = load_half(group + W::scales);
            f32x16 other{};
            if constexpr (W::bytes != Int8::bytes) other = load_half(group + W::scales + 32);
            for (int m = 0; m < MR; m++) {
                const int8_t* b = codes + (size_t)m * x.columns + g * kGroup;
                const float d = scales[(size_t)m * groups + g];
                const float* s = sums + ((size_t)m * groups + g) * 2;
                i32x16 low{}, high{};
                for (int i = 0; i < 4; i++) {
                    low = dot(low, c[i], four(b + 4 * i));
                    high = dot(high, c[i + 4], four(b + 16 + 4 * i));
                }
                if constexpr (W::bytes == Int6::bytes) {
                    sum[m][n] += scale * (to_float(low) * d - 32 * s[0]);
                    sum[m][n] += other * (to_float(high) * d - 32 * s[1]);
                } else if constexpr (W::bytes == Int4::bytes) {
                    sum[m][n] += to_float(low + high) * d * scale;
                    sum[m][n] += other * (s[0] + s[1]);
                } else {
                    sum[m][n] += scale * (to_float(low + high) * d - 128 * (s[0] + s[1]));
                }
            }
        }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) store(out + (size_t)m * stride + n * kTile, sum[m][n]);
}

// ---- Dense weights ------------------------------------------------------------------------------

struct F32 {
    static constexpr int step = 1, bytes = 64;
};
struct F16 {
    static constexpr int step = 1, bytes = 32;
};
struct BF16 {
    static constexpr int step = 2, bytes = 64;
};

template <class W, int MR, int NT>
INLINE void multiply_dense(const uint8_t* const (&tiles)[NT], const uint8_t* const (&)[NT], bool,
                           const Rows& x, int row, float* out, int stride) {
    f32x16 sum[MR][NT];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) sum[m][n] = f32x16{};
    const int steps = x.columns / W::step;
#if defined(__AVX512BF16__)
    if constexpr (W::step == 2) {
        const uint16_t* in = x.halves + (size_t)row * x.columns;
        for (int k = 0; k < steps; k++) {
            u32x16 w[NT];
            for (int n = 0; n < NT; n++) w[n] = load<u32x16>(tiles[n] + (size_t)k * 64);
            for (int m = 0; m < MR; m++) {
                const __m512i b = _mm512_set1_epi32(load<int32_t>(in + (size_t)m * x.columns + 2 * k));
                for (int n = 0; n < NT; n++)
                    sum[m][n] = (f32x16)_mm512_dpbf16_ps((__m512)sum[m][n], (__m512bh)w[n], (__m512bh)b);
            }
        }
    } else
#endif
    {
        const float* in = x.floats + (size_t)row * x.columns;
        for (int k = 0; k < steps; k++)
            for (int n = 0; n < NT; n++) {
                const uint8_t* from = tiles[n] + (size_t)k * W::bytes;
                if constexpr (W::step == 2) {
                    const u32x16 pair = load<u32x16>(from);
                    const f32x16 even = (f32x16)(pair << 16), odd = (f32x16)(pair & 0xffff0000u);
                    for (int m = 0; m < MR; m++) {
                        sum[m][n] += even * in[(size_t)m * x.columns + 2 * k];
                        sum[m][n] += odd * in[(size_t)m * x.columns + 2 * k + 1];
                    }
                } else {
                    const f32x16 w = W::bytes == 64 ? load<f32x16>(from) : load_half(from);
                    for (int m = 0; m < MR; m++) sum[m][n] += w * in[(size_t)m * x.columns + k];
                }
            }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) store(out + (size_t)m * stride + n * kTile, sum[m][n]);
}

template <class W> constexpr bool is_codes() { return W::bytes > 64; }

template <class W, int MR, int NT>
INLINE void multiply_block(const uint8_t* const (&tiles)[NT], const uint8_t* const (&unpacked)[NT],
                           bool is_unpacked, const Rows& x, int row, float* out, int stride) {
    if constexpr (is_codes<W>())
        multiply_codes<W, MR, NT>(tiles, unpacked, is_unpacked, x, row, out, stride);
    else
        multiply_dense<W, MR, NT>(tiles, unpacked, is_unpacked, x, row, out, stride);
}

// All rows by NT tiles, in blocks of up to MR rows.
template <class W, int MR, int NT>
void multiply_rows(const Matrix& matrix, int tile, const Rows& x, int row, int rows, float* out,
                   int stride, uint8_t* scratch) {
    const uint8_t *tiles[NT], *unpacked[NT];
    const bool unpack = is_codes<W>() && !std::is_same_v<W, Int8> && rows > 2 * MR;
    for (int n = 0; n < NT; n++) {
        tiles[n] = matrix.data + (size_t)(tile + n) * matrix.tile_bytes;
        unpacked[n] = scratch + (size_t)n * x.columns * kTile;
        if constexpr (is_codes<W>())
            if (unpack)
                for (int g = 0; g < x.columns / kGroup; g++) {
                    u8x64 c[8];
                    W::codes(tiles[n] + (size_t)g * W::bytes, c);
                    for (int s = 0; s < 8; s++)
                        store((uint8_t*)unpacked[n] + (size_t)g * 512 + 64 * s, c[s]);
                }
    }
    int done = 0;
    for (; done + MR <= rows; done += MR) {
        if (unpack)
            multiply_block<W, MR, NT>(tiles, unpacked, true, x, row + done, out + (size_t)done * stride, stride);
        else
            multiply_block<W, MR, NT>(tiles, unpacked, false, x, row + done, out + (size_t)done * stride, stride);
    }
    if constexpr (MR > 1)
        if (done < rows)
            multiply_rows<W, MR / 2, NT>(matrix, tile, x, row + done, rows - done,
                                         out + (size_t)done * stride, stride, scratch);
}

template <class W>
void multiply_kind(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows,
                   float* out, uint8_t* scratch) {
    const int stride = tiles * kTile;
    if (rows == 1 && tiles == 4) return multiply_rows<W, 1, 4>(matrix, tile, x, row, rows, out, stride, scratch);
    int n = 0;
    for (; n + 2 <= tiles; n += 2)
        multiply_rows<W, (is_codes<W>() ? 4 : 8), 2>(matrix, tile + n, x, row, rows, out + n * kTile, stride, scratch);
    if (n < tiles)
        multiply_rows<W, 8, 1>(matrix, tile + n, x, row, rows, out + n * kTile, stride, scratch);
}

void multiply(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows,
              float* out, uint8_t* scratch) {
    switch (matrix.kind) {
        case Kind::F32: return multiply_kind<F32>(matrix, tile, tiles, x, row, rows, out, scratch);
        case Kind::F16: return multiply_kind<F16>(matrix, tile, tiles, x, row, rows, out, scratch);
        case Kind::BF16: return multiply_kind<BF16>(matrix, tile, tiles, x, row, rows, out, scratch);
        case Kind::INT4: return multiply_kind<Int4>(matrix, tile, tiles, x, row, rows, out, scratch);
        case Kind::INT6: return multiply_kind<Int6>(matrix, tile, tiles, x, row, rows, out, scratch);
        case Kind::INT8: return multiply_kind<Int8>(matrix, tile, tiles, x, row, rows, out, scratch);
    }
}

// ---- Activations --------------------------------------------------------------------------------

INLINE float sum_of(f32x16 v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}
INLINE float max_of(f32x16 v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
}
INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// The largest magnitude; NaN if there is one, as its bits without the sign are larger than others.
INLINE float largest(f32x16 a, f32x16 b) {
    const i32x16 x = (i32x16)a & 0x7fffffff, y = (i32x16)b & 0x7fffffff, both = x > y ? x : y;
    int32_t bits = both[0];
    for (int i = 1; i < 16; i++) bits = both[i] > bits ? both[i] : bits;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void to_codes(const float* x, int columns, int8_t* codes, float* scales, float* sums) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    for (int g = 0; g < columns / kGroup; g++) {
        const f32x16 a = load<f32x16>(x + 32 * g), b = load<f32x16>(x + 32 * g + 16);
        const float most = largest(a, b);
        if (!(most > 1e-36f && most < INFINITY)) {  // no codes: too small to divide by, or not finite
            std::memset(codes + 32 * g, 0, kGroup);
            scales[g] = sums[2 * g] = sums[2 * g + 1] = most - most;  // then products are NaN
            continue;
        }
        const float scale = most / 127, inverse = 127 / most;
        scales[g] = scale;
        const f32x16 parts[2] = {a, b};
        for (int h = 0; h < 2; h++) {
            const f32x16 v = parts[h] * inverse;
            const i32x16 q = __builtin_convertvector(v + (v < 0 ? splat(-0.5f) : splat(0.5f)), i32x16);
            store(codes + 32 * g + 16 * h, __builtin_convertvector(q, i8x16));
            int total = 0;
            for (int i = 0; i < 16; i++) total += q[i];
            sums[2 * g + h] = scale * total;
        }
    }
}

void to_bfloat16(const float* x, int columns, uint16_t* out) {
    typedef uint16_t u16x16 __attribute__((vector_size(32)));
    for (int i = 0; i < columns; i += 16) {
        const u32x16 v = load<u32x16>(x + i);
        const u32x16 rounded = (v + 0x7fff + (v >> 16 & 1)) >> 16;
        const u32x16 nan = (v >> 16) | 0x40;
        const u32x16 found = (v & 0x7fffffff) > 0x7f800000u ? nan : rounded;
        store(out + i, __builtin_convertvector(found, u16x16));
    }
}

void row_of(const Matrix& matrix, int row, float* out) {
    const uint8_t* tile = matrix.data + (size_t)(row / kTile) * matrix.tile_bytes;
    const int lane = row % kTile;
    if (matrix.kind < Kind::INT4) {
        for (int k = 0; k < matrix.columns; k++) {
            if (matrix.kind == Kind::F32) {
                out[k] = load<float>(tile + ((size_t)k * kTile + lane) * 4);
            } else if (matrix.kind == Kind::F16) {
                out[k] = load_half(tile + (size_t)k * 32)[lane];
            } else {
                uint32_t bits = (uint32_t)load<uint16_t>(tile + ((size_t)(k / 2) * kTile + lane) * 4 + k % 2 * 2) << 16;
                std::memcpy(out + k, &bits, 4);
            }
        }
        return;
    }
    const int size = (int)(tile_bytes(matrix.kind, kGroup));
    for (int g = 0; g < matrix.columns / kGroup; g++, tile += size, out += kGroup) {
        u8x64 c[8];
        f32x16 scale, other{};
        if (matrix.kind == Kind::INT4) {
            Int4::codes(tile, c);
            scale = load_half(tile + Int4::scales), other = load_half(tile + Int4::scales + 32);
        } else if (matrix.kind == Kind::INT6) {
            Int6::codes(tile, c);
            scale = load_half(tile + Int6::scales), other = load_half(tile + Int6::scales + 32);
        } else {
            Int8::codes(tile, c);
            scale = load_half(tile + Int8::scales);
        }
        for (int k = 0; k < kGroup; k++) {
            const int code = c[k / 4][4 * lane + k % 4];
            if (matrix.kind == Kind::INT4) out[k] = scale[lane] * code + other[lane];
            else if (matrix.kind == Kind::INT6) out[k] = (k < 16 ? scale : other)[lane] * (code - 32);
            else out[k] = scale[lane] * (code - 128);
        }
    }
}

void norm(const float* x, const float* weight, int columns, float eps, float* out) {
    f32x16 squares{};
    for (int i = 0; i < columns; i += 16) squares += load<f32x16>(x + i) * load<f32x16>(x + i);
    const float factor = 1 / std::sqrt(sum_of(squares) / columns + eps);
    for (int i = 0; i < columns; i += 16) {
        f32x16 v = load<f32x16>(x + i) * factor;
        if (weight) v *= load<f32x16>(weight + i);
        store(out + i, v);
    }
}

// e^x, to about 2 units in the last place: 2^n times a polynomial in the rest.
INLINE f32x16 exponential(f32x16 x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const f32x16 scaled = x * 1.44269504f;
    const i32x16 n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), i32x16);
    const f32x16 whole = to_float(n);
    const f32x16 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (f32x16)((n + 127) << 23);
}

INLINE f32x16 hyperbolic_tangent(f32x16 x) {
    const f32x16 e = exponential(x * 2.0f);
    return 1.0f - 2.0f / (e + 1.0f);
}

// SiLU or the tanh form of GELU, of the gate, times up.
void gated(const float* gate, const float* up, int count, int activation, float* out) {
    for (int i = 0; i < count; i += 16) {
        const f32x16 g = load<f32x16>(gate + i);
        f32x16 v;
        if (activation == 0) v = g / (1.0f + exponential(-g));
        else v = 0.5f * g * (1.0f + hyperbolic_tangent(0.79788456f * (g + 0.044715f * g * g * g)));
        store(out + i, v * load<f32x16>(up + i));
    }
}

// ---- Attention ----------------------------------------------------------------------------------

template <Cache C> INLINE f32x16 load_cached(const uint8_t* from) {
    if constexpr (C == Cache::F32) return load<f32x16>(from);
    else if constexpr (C == Cache::F16) return load_half(from);
    else return load_bfloat16(from);
}

constexpr int kTokens = 128;  // tokens whose scores are kept before their values are read

// Keys of a block are [block_size / 16][dim][16], values [block_size][dim].
template <Cache C, int Q> void attend_queries(const Attention& a, int start) {
    constexpr int size = C == Cache::F32 ? 4 : 2;
    const size_t part = (size_t)a.block_size * a.dim * size, block = 2 * part * a.heads;
    alignas(64) float scores[Q][kTokens];
    const int chunks = a.dim / 16;
    const float* queries[Q];
    int first = INT32_MAX, stop = 0;
    float most[Q], total[Q];
    for (int q = 0; q < Q; q++) {
        queries[q] = a.queries + (size_t)(start + q) * a.query_stride;
        if (a.first[start + q] < first) first = a.first[start + q];
        if (a.length[start + q] > stop) stop = a.length[start + q];
        most[q] = a.sinks ? a.sinks[start + q] : -INFINITY;
        total[q] = a.sinks ? 1 : 0;
        for (int c = 0; c < chunks; c++)
            store(a.output + (size_t)(start + q) * a.dim + 16 * c, f32x16{});
    }
    for (int base = first / 16 * 16; base < stop; base += kTokens) {
        const int end = base + kTokens < stop ? base + kTokens : stop;
        f32x16 peak[Q];
        for (int q = 0; q < Q; q++) peak[q] = splat(-INFINITY);
        for (int token = base; token < end; token += 16) {
            const uint8_t* keys = a.pool + (size_t)a.table[token / a.block_size] * block + part * a.head +
                                  (size_t)(token % a.block_size / 16) * a.dim * 16 * size;
            f32x16 s[Q];
            for (int q = 0; q < Q; q++) s[q] = f32x16{};
            for (int d = 0; d < a.dim; d++) {
                const f32x16 k = load_cached<C>(keys + (size_t)d * 16 * size);
                for (int q = 0; q < Q; q++) s[q] += k * queries[q][d];
            }
            const i32x16 place = token + i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            for (int q = 0; q < Q; q++) {
                f32x16 v = s[q] * a.scale;
                if (a.softcap > 0) v = a.softcap * hyperbolic_tangent(v / a.softcap);
                v = place < a.length[start + q] ? v : splat(-INFINITY);
                v = place >= a.first[start + q] ? v : splat(-INFINITY);
                store(&scores[q][token - base], v);
                peak[q] = max(peak[q], v);
            }
        }
        const int span = (end - base + 15) / 16 * 16;
        for (int q = 0; q < Q; q++) {
            const float top = max_of(peak[q]);
            const float best = top > most[q] ? top : most[q];
            const bool any = best > -INFINITY;
            const float shrink = any ? std::exp(most[q] - best) : 1;
            f32x16 sum{};
            for (int i = 0; i < span; i += 16) {
                const f32x16 v = load<f32x16>(&scores[q][i]);
                f32x16 p = exponential(v - (any ? best : 0));
                p = v == -INFINITY ? f32x16{} : p;
                store(&scores[q][i], p);
                sum += p;
            }
            total[q] = total[q] * shrink + sum_of(sum);
            most[q] = best;
            if (shrink != 1)
                for (int c = 0; c < chunks; c++) {
                    float* out = a.output + (size_t)(start + q) * a.dim + 16 * c;
                    store(out, load<f32x16>(out) * shrink);
                }
        }
        for (int c = 0; c < chunks; c++) {
            f32x16 sum[Q];
            for (int q = 0; q < Q; q++) sum[q] = load<f32x16>(a.output + (size_t)(start + q) * a.dim + 16 * c);
            for (int token = base; token < end; token += 16) {
                const uint8_t* values = a.pool + (size_t)a.table[token / a.block_size] * block + part * (a.heads + a.head) +
                                        ((size_t)(token % a.block_size) * a.dim + 16 * c) * size;
                const int count = end - token < 16 ? end - token : 16;
                for (int t = 0; t < count; t++) {
                    const f32x16 v = load_cached<C>(values + (size_t)t * a.dim * size);
                    for (int q = 0; q < Q; q++) sum[q] += v * scores[q][token - base + t];
                }
            }
            for (int q = 0; q < Q; q++) store(a.output + (size_t)(start + q) * a.dim + 16 * c, sum[q]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int c = 0; c < chunks; c++) {
            float* out = a.output + (size_t)(start + q) * a.dim + 16 * c;
            store(out, load<f32x16>(out) * (1 / total[q]));
        }
}

template <Cache C> void attend_cache(const Attention& a) {
    int done = 0;
    for (; done + 8 <= a.count; done += 8) attend_queries<C, 8>(a, done);
    for (; done + 4 <= a.count; done += 4) attend_queries<C, 4>(a, done);
    if (a.count - done == 3) attend_queries<C, 3>(a, done), done += 3;
    if (a.count - done == 2) attend_queries<C, 2>(a, done), done += 2;
    if (done < a.count) attend_queries<C, 1>(a, done);
}

void attend(const Attention& a) {
    switch (a.cache) {
        case Cache::F32: return attend_cache<Cache::F32>(a);
        case Cache::F16: return attend_cache<Cache::F16>(a);
        case Cache::BF16: return attend_cache<Cache::BF16>(a);
    }
}

}  // namespace

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

const Kernels* NAME(MODELPACK_ISA)() {
    static const Kernels kernels = {
        TEXT(MODELPACK_ISA),
#if defined(__AVX512BF16__)
        true,
#else
        false,
#endif
        multiply, to_codes, to_bfloat16, row_of, norm, gated, attend,
    };
    return &kernels;
}

}  // namespace modelpack
