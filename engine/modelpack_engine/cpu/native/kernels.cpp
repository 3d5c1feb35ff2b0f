// The kernels, compiled once for each instruction set: MODELPACK_ISA names the function that
// returns them. Vectors are those of GCC and Clang, as wide as the registers: they compile wider
// ones to loads and stores of each part. Only dot products and conversions of halves need
// intrinsics.
#include "kernels.hpp"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace modelpack {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = kTile / kLanes;  // vectors of a tile
// Up to so many rows are multiplied by one tile at a time, whose bytes are prefetched so many ahead.
constexpr int kFewRows = 12, kAhead = 8192;

// The largest blocks: rows and vectors whose sums fit into the registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kCodeRows = 4, kVectors = 2, kVectorsOfOneRow = 4;
#elif defined(__AVX2__)
constexpr int kRows = 4, kCodeRows = 4, kVectors = 2, kVectorsOfOneRow = 2;
#elif defined(__aarch64__)
constexpr int kRows = 8, kCodeRows = 4, kVectors = 2, kVectorsOfOneRow = 4;
#else
constexpr int kRows = 2, kCodeRows = 2, kVectors = 2, kVectorsOfOneRow = 2;
#endif

typedef float f32s __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32s __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32s __attribute__((vector_size(4 * kLanes)));
typedef uint8_t u8s __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16s __attribute__((vector_size(2 * kLanes)));
typedef int8_t i8s __attribute__((vector_size(kLanes)));

#define INLINE inline __attribute__((always_inline))

template <class V> INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
INLINE f32s splat(float x) { return f32s{} + x; }
INLINE f32s to_float(i32s v) { return __builtin_convertvector(v, f32s); }

INLINE f32s load_half(const void* from) {
#if defined(__AVX512F__)
    return (f32s)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (f32s)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
    return (f32s)vcvt_f32_f16(load<float16x4_t>(from));
#else
    // The exponent of a half is 112 less than that of a float, also without a leading one.
    const u32s v = __builtin_convertvector(load<u16s>(from), u32s), bits = (v & 0x7fff) << 13;
    const f32s finite = (f32s)bits * 5.192296858534828e33f;
    const u32s f = (v & 0x7c00) == 0x7c00 ? bits | 0x7f800000 : (u32s)finite;
    return (f32s)(f | (v & 0x8000) << 16);
#endif
}

// GCC converts vectors of other widths in halves, which takes twice as many instructions.
INLINE u32s widened(const void* from) {
#if defined(__AVX512F__)
    return (u32s)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (u32s)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return __builtin_convertvector(load<u16s>(from), u32s);
#endif
}
INLINE void store_u16(void* to, u32s v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)v));
#else
    store(to, __builtin_convertvector(v, u16s));
#endif
}
INLINE void store_i8(void* to, i32s v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    store(to, __builtin_convertvector(v, i8s));
#endif
}

INLINE f32s load_bfloat16(const void* from) { return (f32s)(widened(from) << 16); }

// acc + the dot product of four unsigned bytes of w and four signed bytes of x, in each lane. With `SMALL`,
// all bytes of w are below 128.
template <bool SMALL> INLINE i32s dot(i32s acc, u8s w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (i32s)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    const __m256i v = (__m256i)w, b = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    if constexpr (SMALL) return acc + (i32s)_mm256_madd_epi16(_mm256_maddubs_epi16(v, b), ones);
    // Two sums, since that of bytes above 127 could overflow 16 bits.
    const __m256i small = _mm256_maddubs_epi16(_mm256_and_si256(v, _mm256_set1_epi8(127)), b);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(v, 7), _mm256_set1_epi8(1));
    const __m256i large = _mm256_madd_epi16(_mm256_maddubs_epi16(top, b), ones);
    acc += (i32s)_mm256_madd_epi16(small, ones);
    return acc + ((i32s)large << 7);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (i32s)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(x));
    if constexpr (SMALL) return (i32s)vdotq_s32((int32x4_t)acc, (int8x16_t)w, b);
    // Bytes less 128 are signed; the products of 128 are added.
    const i32s sum = (i32s)vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), b);
    return (i32s)vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ 128), b) + (sum << 7);
#else
    // Products of bytes fit into 16 bits: those of even bytes, then those of odd ones.
    typedef int16_t i16s __attribute__((vector_size(4 * kLanes)));
    const i16s b = (i16s)(i32s{} + x);
    const i16s low = (i16s)((u32s)w & 0x00ff00ff), high = (i16s)((u32s)w >> 8 & 0x00ff00ff);
    const i32s even = (i32s)(low * (b << 8 >> 8)), odd = (i32s)(high * (b >> 8));
    return acc + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
#endif
}

#if defined(__AVX512BF16__)
// acc + the two products of halves of x and y in each lane; y is the same for all.
INLINE f32s dot_pairs(f32s acc, u32s x, uint32_t y) {
    return (f32s)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)_mm512_set1_epi32(y));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE f32s dot_pairs(f32s acc, u32s x, uint32_t y) {
    return (f32s)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)x, vreinterpretq_bf16_u32(vdupq_n_u32(y)));
}
#endif

INLINE int32_t four(const int8_t* from) { return load<int32_t>(from); }

// Tiles that follow those of a product, to be brought to the second cache meanwhile; `data` may be
// null. A processor's own prefetching ends with a tile.
struct Next {
    const uint8_t* data;
    size_t tile_bytes;
    // `bytes` bytes of each of so many tiles, from `at` on.
    template <int TILES> INLINE void bring(size_t at, int bytes) const {
        if (data)
            for (int n = 0; n < TILES; n++)
                for (int b = 0; b < bytes; b += 64) __builtin_prefetch(data + n * tile_bytes + at + b, 0, 2);
    }
};

// ---- Weights in codes ---------------------------------------------------------------------------

struct Int4 {
    static constexpr int bytes = 320, scales = 256;
    static INLINE void codes(const uint8_t* group, u8s (&c)[8]) {
        for (int s = 0; s < 4; s++) {
            const u32s v = load<u32s>(group + 64 * s);
            c[s] = (u8s)(v & 0x0f0f0f0f);
            c[s + 4] = (u8s)(v >> 4 & 0x0f0f0f0f);
        }
    }
};
struct Int6 {
    static constexpr int bytes = 448, scales = 384;
    static INLINE void codes(const uint8_t* group, u8s (&c)[8]) {
        for (int s = 0; s < 4; s++) {
            const u32s v = load<u32s>(group + 64 * s);
            c[s] = (u8s)(v & 0x0f0f0f0f);
            c[s + 4] = (u8s)(v >> 4 & 0x0f0f0f0f);
        }
        for (int h = 0; h < 2; h++) {
            const u32s v = load<u32s>(group + 256 + 64 * h);
            for (int i = 0; i < 4; i++)
                c[4 * h + i] |= (u8s)((v >> 2 * i & 0x03030303) << 4);
        }
    }
};
struct Int8 {
    static constexpr int bytes = 544, scales = 512;
    static INLINE void codes(const uint8_t* group, u8s (&c)[8]) {
        for (int s = 0; s < 8; s++) c[s] = load<u8s>(group + 64 * s);
    }
};
struct UInt8 {
    static constexpr int bytes = 576, scales = 512;
    static INLINE void codes(const uint8_t* group, u8s (&c)[8]) { Int8::codes(group, c); }
};

template <class W> constexpr int scales_of() { return W::bytes == Int6::bytes ? 2 : 1; }

// Add the products of half `half` of a group (INT6), or of all of it, which are exact, to a sum.
template <class W>
INLINE f32s add_products(f32s sum, i32s products, int half, float d, const float* s, f32s scale, f32s other) {
    const f32s found = to_float(products);
    if constexpr (W::bytes == Int6::bytes) return sum + (half ? other : scale) * (found * d - 32 * s[half]);
    else if constexpr (W::bytes == Int4::bytes) return (sum + found * d * scale) + other * (s[0] + s[1]);
    else if constexpr (W::bytes == UInt8::bytes) return sum + (found * d * scale + other * (s[0] + s[1]));
    else return sum + scale * (found * d - 128 * (s[0] + s[1]));
}

// MR rows of activations times NT vectors of tiles, the first of which is part `part` of a tile.
// Codes are those in `unpacked`, 512 bytes a group, if `is_unpacked`.
template <class W, int MR, int NT>
INLINE void multiply_codes(const uint8_t* const (&tiles)[NT], const uint8_t* const (&unpacked)[NT],
                           int part, bool is_unpacked, Next next, const Rows& x, int row, float* out, int stride) {
    const int groups = x.columns / kGroup;
    f32s sum[MR][NT];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) sum[m][n] = f32s{};
    const int8_t* codes = x.codes + (size_t)row * x.columns * 2;
    const float* scales = x.scales + (size_t)row * groups;
    const float* sums = x.sums + (size_t)row * groups * 2;
    constexpr int halves = scales_of<W>(), steps = 8 / halves;
    for (int g = 0; g < groups; g++) {
        u8s c[NT][8];
        f32s scale[NT], other[NT];
        // One row of bytes is read as fast without, as is one of bfloat16.
        if (MR > 1 || W::bytes < Int8::bytes) next.bring<NT / kParts>((size_t)g * W::bytes, W::bytes);
        for (int n = 0; n < NT; n++) {
            const uint8_t* group = tiles[n] + (size_t)g * W::bytes;
            if (!is_unpacked) W::codes(group, c[n]);
            const uint8_t* at = group + W::scales - 2 * kLanes * ((part + n) % kParts);
            scale[n] = load_half(at);
            other[n] = W::bytes == Int8::bytes ? f32s{} : load_half(at + 32);
        }
        for (int h = 0; h < halves; h++) {
            i32s products[MR][NT];
            for (int m = 0; m < MR; m++)
                for (int n = 0; n < NT; n++) products[m][n] = i32s{};
            for (int fine = 0; fine < 2; fine++) {
                for (int i = h * steps; i < (h + 1) * steps; i++) {
                    u8s w[NT];
                    for (int n = 0; n < NT; n++) w[n] = is_unpacked ? load<u8s>(unpacked[n] + (size_t)g * 512 + 64 * i) : c[n][i];
                    for (int m = 0; m < MR; m++) {
                        const int32_t b = four(codes + ((size_t)m * x.columns + g * kGroup) * 2 + fine * kGroup + 4 * i);
                        for (int n = 0; n < NT; n++) products[m][n] = dot<W::bytes < Int8::bytes>(products[m][n], w[n], b);
                    }
                }
                if (!fine)
                    for (int m = 0; m < MR; m++)
                        for (int n = 0; n < NT; n++) products[m][n] = products[m][n] << 8;
            }
            for (int m = 0; m < MR; m++)
                for (int n = 0; n < NT; n++)
                    sum[m][n] = add_products<W>(sum[m][n], products[m][n], h, scales[(size_t)m * groups + g],
                                                sums + ((size_t)m * groups + g) * 2, scale[n], other[n]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) store(out + (size_t)m * stride + n * kLanes, sum[m][n]);
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

// With `AHEAD`, weights `kAhead` bytes ahead are prefetched, otherwise those of `next`.
template <class W, int MR, int NT, bool AHEAD = false>
INLINE void multiply_dense(const uint8_t* const (&tiles)[NT], [[maybe_unused]] Next next,
                           const Rows& x, int row, float* out, int stride) {
    f32s sum[MR][NT];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) sum[m][n] = f32s{};
    const int steps = x.columns / W::step;
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    if constexpr (W::step == 2) {
        const uint16_t* in = x.halves + (size_t)row * x.columns;
        for (int k = 0; k < steps; k++) {
            u32s w[NT];
            for (int n = 0; n < NT; n++) w[n] = load<u32s>(tiles[n] + (size_t)k * 64);
            if (AHEAD) __builtin_prefetch(tiles[0] + (size_t)k * 64 + kAhead);
            else if (MR > 1) next.bring<NT / kParts>((size_t)k * 64, 64);
            for (int m = 0; m < MR; m++) {
                const uint32_t pair = load<uint32_t>(in + (size_t)m * x.columns + 2 * k);
                for (int n = 0; n < NT; n++) sum[m][n] = dot_pairs(sum[m][n], w[n], pair);
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
                    const u32s pair = load<u32s>(from);
                    const f32s even = (f32s)(pair << 16), odd = (f32s)(pair & 0xffff0000u);
                    for (int m = 0; m < MR; m++) {
                        sum[m][n] += even * in[(size_t)m * x.columns + 2 * k];
                        sum[m][n] += odd * in[(size_t)m * x.columns + 2 * k + 1];
                    }
                } else {
                    const f32s w = W::bytes == 64 ? load<f32s>(from) : load_half(from);
                    for (int m = 0; m < MR; m++) sum[m][n] += w * in[(size_t)m * x.columns + k];
                }
            }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NT; n++) store(out + (size_t)m * stride + n * kLanes, sum[m][n]);
}

template <class W> constexpr bool is_codes() { return W::bytes > 64; }

template <class W, int MR, int NT>
INLINE void multiply_block(const uint8_t* const (&tiles)[NT], const uint8_t* const (&unpacked)[NT],
                           int part, bool is_unpacked, Next next, const Rows& x, int row, float* out, int stride) {
    if constexpr (is_codes<W>())
        multiply_codes<W, MR, NT>(tiles, unpacked, part, is_unpacked, next, x, row, out, stride);
    else
        multiply_dense<W, MR, NT>(tiles, next, x, row, out, stride);
}

#if defined(__AVX512BF16__)
// Few rows are multiplied as fast as memory is read: by one tile after the other, all rows at once.
template <class W, int MR = kFewRows>
INLINE void multiply_few(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows, float* out) {
    if constexpr (MR > 1)
        if (rows < MR) return multiply_few<W, MR - 1>(matrix, tile, tiles, x, row, rows, out);
    for (int n = 0; n < tiles; n++) {
        const uint8_t* const from[1] = {matrix.data + (tile + n) * matrix.tile_bytes};
        multiply_dense<W, MR, 1, true>(from, Next{}, x, row, out + n * kTile, tiles * kTile);
    }
}
#endif

// All rows by NT vectors of tiles from `first` on, in blocks of up to MR rows.
template <class W, int MR, int NT>
void multiply_rows(const Matrix& matrix, int first, const Rows& x, int row, int rows, float* out,
                   int stride, uint8_t* scratch, const uint8_t* next) {
    const uint8_t *tiles[NT], *unpacked[NT];
    const bool bytes = std::is_same_v<W, Int8> || std::is_same_v<W, UInt8>;
    const bool unpack = is_codes<W>() && !bytes && rows > 2 * MR;
    for (int n = 0; n < NT; n++) {
        const int tile = (first + n) / kParts, lane = (first + n) % kParts * kLanes;
        tiles[n] = matrix.data + tile * matrix.tile_bytes + lane * (W::bytes == F16::bytes ? 2 : 4);
        unpacked[n] = scratch + (size_t)(tile - first / kParts) * x.columns * kTile + 4 * lane;
        if constexpr (is_codes<W>())
            if (unpack)
                for (int g = 0; g < x.columns / kGroup; g++) {
                    u8s c[8];
                    W::codes(tiles[n] + (size_t)g * W::bytes, c);
                    for (int s = 0; s < 8; s++)
                        store((uint8_t*)unpacked[n] + (size_t)g * 512 + 64 * s, c[s]);
                }
    }
    const int part = first % kParts;
    int done = 0;
    for (; done + MR <= rows; done += MR) {
        const Next after{done ? nullptr : next, matrix.tile_bytes};
        float* to = out + (size_t)done * stride;
        if (unpack) multiply_block<W, MR, NT>(tiles, unpacked, part, true, after, x, row + done, to, stride);
        else multiply_block<W, MR, NT>(tiles, unpacked, part, false, after, x, row + done, to, stride);
    }
    if constexpr (MR > 1)
        if (done < rows)
            multiply_rows<W, MR / 2, NT>(matrix, first, x, row + done, rows - done,
                                         out + (size_t)done * stride, stride, scratch, done ? nullptr : next);
}

#if defined(__AMX_BF16__)
// Give the registers of AMX their shapes: sums and activations `rows` rows, weights 16.
INLINE void use_tiles(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i < 5 ? rows : 16);
    }
    _tile_loadconfig(&config);
}

// Any number of rows, 16 at a time, by AMX: registers 0 to 3 have the sums of up to four tiles, 4
// activations, 5 and 6 weights. A single row is as fast as by vectors, whose sums have other bits.
void multiply_by_tiles(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows, float* out) {
    const uint8_t* weights = matrix.data + tile * matrix.tile_bytes;
    const size_t size = matrix.tile_bytes;
    const long stride = (long)tiles * kTile * 4;
    for (int done = 0; done < rows; done += 16) {
        if (done == 0 || rows - done < 16) use_tiles(rows - done < 16 ? rows - done : 16);
        const uint16_t* in = x.halves + (size_t)(row + done) * x.columns;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < x.columns; k += 32) {
            const uint8_t* from = weights + (size_t)k * 32;
            _tile_loadd(4, in + k, (long)x.columns * 2);
            _tile_loadd(5, from, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (tiles > 1) {
                _tile_loadd(6, from + size, 64);
                _tile_dpbf16ps(1, 4, 6);
            }
            if (tiles > 2) {
                _tile_loadd(5, from + 2 * size, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if (tiles > 3) {
                _tile_loadd(6, from + 3 * size, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        float* to = out + (size_t)done * tiles * kTile;
        _tile_stored(0, to, stride);
        if (tiles > 1) _tile_stored(1, to + kTile, stride);
        if (tiles > 2) _tile_stored(2, to + 2 * kTile, stride);
        if (tiles > 3) _tile_stored(3, to + 3 * kTile, stride);
    }
    _tile_release();
}
#endif

template <class W>
void multiply_kind(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows,
                   float* out, uint8_t* scratch, const uint8_t* next) {
    const int stride = tiles * kTile, first = tile * kParts, vectors = tiles * kParts;
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<W, BF16>) return multiply_by_tiles(matrix, tile, tiles, x, row, rows, out);
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<W, BF16>)
        if (rows > 1 && rows <= kFewRows) return multiply_few<W>(matrix, tile, tiles, x, row, rows, out);
#endif
    int n = 0;
    // What is read after `count` vectors from `n` on: as many of these tiles, or what follows them.
    auto after = [&](int count) {
        return n + 2 * count <= vectors ? matrix.data + (first + n + count) * matrix.tile_bytes / kParts : next;
    };
    if (rows == 1 && vectors % kVectorsOfOneRow == 0)
        for (; n < vectors; n += kVectorsOfOneRow)
            multiply_rows<W, 1, kVectorsOfOneRow>(matrix, first + n, x, row, 1, out + n * kLanes, stride, scratch,
                                                  after(kVectorsOfOneRow));
    for (; n + kVectors <= vectors; n += kVectors)
        multiply_rows<W, (is_codes<W>() ? kCodeRows : kRows), kVectors>(
            matrix, first + n, x, row, rows, out + n * kLanes, stride, scratch, after(kVectors));
    if constexpr (kParts % kVectors != 0)
        if (n < vectors)
            multiply_rows<W, kRows, 1>(matrix, first + n, x, row, rows, out + n * kLanes, stride, scratch, nullptr);
}

void multiply(const Matrix& matrix, int tile, int tiles, const Rows& x, int row, int rows,
              float* out, uint8_t* scratch, const uint8_t* next) {
    switch (matrix.kind) {
        case Kind::F32: return multiply_kind<F32>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::F16: return multiply_kind<F16>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::BF16: return multiply_kind<BF16>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::INT4: return multiply_kind<Int4>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::INT6: return multiply_kind<Int6>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::INT8: return multiply_kind<Int8>(matrix, tile, tiles, x, row, rows, out, scratch, next);
        case Kind::UINT8: return multiply_kind<UInt8>(matrix, tile, tiles, x, row, rows, out, scratch, next);
    }
}

// ---- Activations --------------------------------------------------------------------------------

INLINE float sum_of(f32s v) {
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += v[i];
    return total;
}
INLINE float max_of(f32s v) {
    float most = v[0];
    for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
    return most;
}
INLINE f32s max(f32s a, f32s b) { return a > b ? a : b; }

// The largest magnitude; NaN if there is one, as its bits without the sign are larger than others.
template <int N> INLINE float largest(const f32s (&v)[N]) {
    i32s most{};
    for (int i = 0; i < N; i++) {
        const i32s x = (i32s)v[i] & 0x7fffffff;
        most = x > most ? x : most;
    }
    int32_t bits = most[0];
    for (int i = 1; i < kLanes; i++) bits = most[i] > bits ? most[i] : bits;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE i32s rounded(f32s v) { return __builtin_convertvector(v + (v < 0 ? splat(-0.5f) : splat(0.5f)), i32s); }

void to_codes(const float* x, int columns, int8_t* codes, float* scales, float* sums) {
    constexpr int count = kGroup / kLanes;
    for (int g = 0; g < columns / kGroup; g++) {
        f32s v[count];
        for (int i = 0; i < count; i++) v[i] = load<f32s>(x + kGroup * g + kLanes * i);
        const float most = largest(v);
        if (!(most > 1e-36f && most < INFINITY)) {  // no codes: too small to divide by, or not finite
            std::memset(codes + 2 * kGroup * g, 0, 2 * kGroup);
            scales[g] = sums[2 * g] = sums[2 * g + 1] = most - most;  // then products are NaN
            continue;
        }
        const float scale = most / (127 * 256), inverse = 127 / most;
        scales[g] = scale;
        for (int h = 0; h < 2; h++) {
            i32s total{};
            for (int i = h * count / 2; i < (h + 1) * count / 2; i++) {
                const f32s scaled = v[i] * inverse;
                const i32s coarse = rounded(scaled);
                i32s fine = rounded((scaled - to_float(coarse)) * 256.0f);
                fine = fine > 127 ? i32s{} + 127 : fine;
                store_i8(codes + 2 * kGroup * g + kLanes * i, coarse);
                store_i8(codes + 2 * kGroup * g + kGroup + kLanes * i, fine);
                total += (coarse << 8) + fine;
            }
            int sum = 0;
            for (int i = 0; i < kLanes; i++) sum += total[i];
            sums[2 * g + h] = scale * sum;
        }
    }
}

void to_bfloat16(const float* x, int columns, uint16_t* out) {
    for (int i = 0; i < columns; i += kLanes) {
        const u32s v = load<u32s>(x + i);
        const u32s rounded = (v + 0x7fff + (v >> 16 & 1)) >> 16;
        const u32s nan = (v >> 16) | 0x40;
        const u32s found = (v & 0x7fffffff) > 0x7f800000u ? nan : rounded;
        store_u16(out + i, found);
    }
}

void row_of(const Matrix& matrix, int row, float* out) {
    const uint8_t* tile = matrix.data + (size_t)(row / kTile) * matrix.tile_bytes;
    const int lane = row % kTile, part = lane / kLanes * kLanes;
    if (matrix.kind < Kind::INT4) {
        for (int k = 0; k < matrix.columns; k++) {
            if (matrix.kind == Kind::F32) {
                out[k] = load<float>(tile + ((size_t)k * kTile + lane) * 4);
            } else if (matrix.kind == Kind::F16) {
                out[k] = load_half(tile + (size_t)k * 32 + 2 * part)[lane - part];
            } else {
                uint32_t bits = (uint32_t)load<uint16_t>(tile + ((size_t)(k / 2) * kTile + lane) * 4 + k % 2 * 2) << 16;
                std::memcpy(out + k, &bits, 4);
            }
        }
        return;
    }
    const int size = (int)(tile_bytes(matrix.kind, kGroup));
    for (int g = 0; g < matrix.columns / kGroup; g++, tile += size, out += kGroup) {
        u8s c[8];
        f32s scale, other{};
        const uint8_t *codes = tile + 4 * part, *halves = tile + 2 * part;
        if (matrix.kind == Kind::INT4) {
            Int4::codes(codes, c);
            scale = load_half(halves + Int4::scales), other = load_half(halves + Int4::scales + 32);
        } else if (matrix.kind == Kind::INT6) {
            Int6::codes(codes, c);
            scale = load_half(halves + Int6::scales), other = load_half(halves + Int6::scales + 32);
        } else {
            Int8::codes(codes, c);
            scale = load_half(halves + Int8::scales);
            if (matrix.kind == Kind::UINT8) other = load_half(halves + UInt8::scales + 32);
        }
        for (int k = 0; k < kGroup; k++) {
            const int code = c[k / 4][4 * (lane - part) + k % 4];
            if (matrix.kind == Kind::INT4 || matrix.kind == Kind::UINT8) out[k] = scale[lane - part] * code + other[lane - part];
            else if (matrix.kind == Kind::INT6) out[k] = (k < 16 ? scale : other)[lane - part] * (code - 32);
            else out[k] = scale[lane - part] * (code - 128);
        }
    }
}

void norm(const float* x, const float* weight, int columns, float eps, float* out) {
    f32s squares{};
    for (int i = 0; i < columns; i += kLanes) squares += load<f32s>(x + i) * load<f32s>(x + i);
    const float factor = 1 / std::sqrt(sum_of(squares) / columns + eps);
    for (int i = 0; i < columns; i += kLanes) {
        f32s v = load<f32s>(x + i) * factor;
        if (weight) v *= load<f32s>(weight + i);
        store(out + i, v);
    }
}

// e^x, to about 2 units in the last place: 2^n times a polynomial in the rest.
INLINE f32s exponential(f32s x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const f32s scaled = x * 1.44269504f;
    const i32s n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), i32s);
    const f32s whole = to_float(n);
    const f32s r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    f32s p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (f32s)((n + 127) << 23);
}

INLINE f32s hyperbolic_tangent(f32s x) {
    const f32s e = exponential(x * 2.0f);
    return 1.0f - 2.0f / (e + 1.0f);
}

// SiLU or the tanh form of GELU, of the gate, times up.
void gated(const float* gate, const float* up, int count, int activation, float* out) {
    for (int i = 0; i < count; i += kLanes) {
        const f32s g = load<f32s>(gate + i);
        f32s v;
        if (activation == 0) v = g / (1.0f + exponential(-g));
        else v = 0.5f * g * (1.0f + hyperbolic_tangent(0.79788456f * (g + 0.044715f * g * g * g)));
        store(out + i, v * load<f32s>(up + i));
    }
}

// Write rows of products, times `scale`, to a part of rows that are `pitch` apart; or add them.
void finish(const float* products, int stride, int count, int rows, float scale, bool adds, float* to, size_t pitch) {
    for (int row = 0; row < rows; row++, products += stride, to += pitch) {
        int i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const f32s v = scale * load<f32s>(products + i);
            store(to + i, adds ? load<f32s>(to + i) + v : v);
        }
        for (; i < count; i++) to[i] = adds ? to[i] + scale * products[i] : scale * products[i];
    }
}

// ---- Attention ----------------------------------------------------------------------------------

template <Cache C> INLINE f32s load_cached(const uint8_t* from) {
    if constexpr (C == Cache::F32) return load<f32s>(from);
    else if constexpr (C == Cache::F16) return load_half(from);
    else return load_bfloat16(from);
}

constexpr int kTokens = 128;  // tokens whose scores are kept before their values are read

// Caches of bfloat16 are multiplied in pairs, where a processor can: queries and scores are rounded to
// bfloat16, too. A uint32 of [..][Q] holds two neighbouring elements of a query, or its scores of two
// neighbouring tokens.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// s[q] += the products of 16 keys [dim][16] with query q.
template <int Q> void score_pairs(const uint8_t* keys, const uint32_t (*queries)[Q], int dim, f32s (&s)[Q]);
// The output of each query += its scores times the values of tokens from `base` to `end`; all queries see
// those from `all_from` to `all_stop`.
template <int Q>
void add_pairs(const Attention& a, int start, int base, int end, int all_from, int all_stop,
               const uint32_t (*scores)[Q]);

#if defined(__AVX512BF16__)
// Which numbers become pairs: those from `first` on with those from `second` on.
INLINE __m512i pairs_of(int first, int second) {
    alignas(64) uint16_t from[2 * kLanes];
    for (int i = 0; i < kLanes; i++) from[2 * i] = first + i, from[2 * i + 1] = second + i;
    return _mm512_load_si512(from);
}

// 32 elements of a token, and of the next one, as pairs.
INLINE void load_pairs(const uint8_t* values, int dim, __m512i (&v)[2]) {
    const __m512i one = _mm512_loadu_si512(values), two = _mm512_loadu_si512(values + (size_t)dim * 2);
    v[0] = _mm512_permutex2var_epi16(one, pairs_of(0, 2 * kLanes), two);
    v[1] = _mm512_permutex2var_epi16(one, pairs_of(kLanes, 3 * kLanes), two);
}

template <int Q> INLINE void score_pairs(const uint8_t* keys, const uint32_t (*queries)[Q], int dim, f32s (&s)[Q]) {
    for (int d = 0; d < dim / 2; d++) {
        const __m512i both = _mm512_loadu_si512(keys + (size_t)d * 4 * kLanes);
        const __m512i k = _mm512_permutexvar_epi16(pairs_of(0, kLanes), both);
        for (int q = 0; q < Q; q++) s[q] = dot_pairs(s[q], (u32s)k, queries[d][q]);
    }
}

// As `add_pairs`, for 32 elements of up to 16 tokens that some queries do not see. Not in line: the sums of
// `add_pairs` would not stay in registers.
template <int Q>
__attribute__((noinline)) void add_seen_pairs(const Attention& a, int start, int token, int count, const uint8_t* values,
                                              const uint32_t (*scores)[Q], f32s (*sum)[2]) {
    for (int t = 0; t < count; t += 2) {
        __m512i v[2];
        load_pairs(values + (size_t)t * a.dim * 2, a.dim, v);
        for (int q = 0; q < Q; q++) {
            // A score of 0 would not keep out a value that is not finite.
            const int at = token + t, first = a.first[start + q], stop = a.length[start + q];
            const __mmask32 seen = (at >= first && at < stop ? 0x55555555u : 0) |
                                   (at + 1 >= first && at + 1 < stop ? 0xaaaaaaaau : 0);
            for (int h = 0; h < 2; h++)
                sum[q][h] = dot_pairs(sum[q][h], (u32s)_mm512_maskz_mov_epi16(seen, v[h]), scores[t / 2][q]);
        }
    }
}

template <int Q>
INLINE void add_pairs(const Attention& a, int start, int base, int end, int all_from, int all_stop,
                      const uint32_t (*scores)[Q]) {
    const size_t part = (size_t)a.block_size * a.dim * 2, block = 2 * part * a.heads;
    for (int c = 0; c < a.dim; c += 2 * kLanes) {
        f32s sum[Q][2];
        float* out = a.output + (size_t)start * a.dim + c;
        for (int q = 0; q < Q; q++)
            for (int h = 0; h < 2; h++) sum[q][h] = load<f32s>(out + (size_t)q * a.dim + h * kLanes);
        for (int token = base; token < end; token += 16) {
            const uint8_t* values = a.pool + (size_t)a.table[token / a.block_size] * block + part * (a.heads + a.head) +
                                    ((size_t)(token % a.block_size) * a.dim + c) * 2;
            const uint32_t (*by)[Q] = scores + (token - base) / 2;
            if (token + 16 <= end && token >= all_from && token + 16 <= all_stop) {
                for (int t = 0; t < 16; t += 2) {
                    __m512i v[2];
                    load_pairs(values + (size_t)t * a.dim * 2, a.dim, v);
                    for (int q = 0; q < Q; q++) {
                        sum[q][0] = dot_pairs(sum[q][0], (u32s)v[0], by[t / 2][q]);
                        sum[q][1] = dot_pairs(sum[q][1], (u32s)v[1], by[t / 2][q]);
                    }
                }
            } else {
                f32s some[Q][2];
                for (int q = 0; q < Q; q++) some[q][0] = sum[q][0], some[q][1] = sum[q][1];
                add_seen_pairs<Q>(a, start, token, end - token < 16 ? end - token : 16, values, by, some);
                for (int q = 0; q < Q; q++) sum[q][0] = some[q][0], sum[q][1] = some[q][1];
            }
        }
        for (int q = 0; q < Q; q++)
            for (int h = 0; h < 2; h++) store(out + (size_t)q * a.dim + h * kLanes, sum[q][h]);
    }
}
#endif

// Keys of a block are [block_size / 16][dim][16], values [block_size][dim].
template <Cache C, bool Paired, int Q> void attend_queries(const Attention& a, int start) {
    constexpr int size = C == Cache::F32 ? 4 : 2;
    const size_t part = (size_t)a.block_size * a.dim * size, block = 2 * part * a.heads;
    alignas(64) float scores[Q][kTokens];
    const int chunks = a.dim / kLanes;
    float queries[kLargestHead][Q];
    uint32_t query_pairs[kLargestHead / 2][Q], pairs[kTokens / 2][Q];
    uint16_t halves[kLargestHead > kTokens ? kLargestHead : kTokens];
    i32s numbers{};
    for (int i = 0; i < kLanes; i++) numbers[i] = i;
    // All queries see the tokens from `all_from` to `all_stop`, and none those out of first to stop.
    int first = INT32_MAX, stop = 0, all_from = 0, all_stop = INT32_MAX;
    float most[Q], total[Q];
    for (int q = 0; q < Q; q++) {
        const float* query = a.queries + (size_t)(start + q) * a.query_stride;
        if constexpr (Paired) {
            to_bfloat16(query, a.dim, halves);
            for (int d = 0; d < a.dim / 2; d++) query_pairs[d][q] = load<uint32_t>(halves + 2 * d);
        } else {
            for (int d = 0; d < a.dim; d++) queries[d][q] = query[d];
        }
        if (a.first[start + q] < first) first = a.first[start + q];
        if (a.length[start + q] > stop) stop = a.length[start + q];
        if (a.first[start + q] > all_from) all_from = a.first[start + q];
        if (a.length[start + q] < all_stop) all_stop = a.length[start + q];
        most[q] = a.sinks ? a.sinks[start + q] : -INFINITY;
        total[q] = a.sinks ? 1 : 0;
        for (int c = 0; c < chunks; c++)
            store(a.output + (size_t)(start + q) * a.dim + kLanes * c, f32s{});
    }
    // Scores are kept from one multiple of kTokens to the next, so that a row is the same whatever attends with it.
    for (int base = first / 16 * 16, end; base < stop; base = end) {
        end = (base / kTokens + 1) * kTokens;
        if (end > stop) end = stop;
        f32s peak[Q];
        for (int q = 0; q < Q; q++) peak[q] = splat(-INFINITY);
        for (int token = base; token < end; token += kLanes) {
            const uint8_t* keys = a.pool + (size_t)a.table[token / a.block_size] * block + part * a.head +
                                  ((size_t)(token % a.block_size / 16) * a.dim * 16 + token % 16) * size;
            f32s s[Q];
            for (int q = 0; q < Q; q++) s[q] = f32s{};
            if constexpr (Paired) score_pairs<Q>(keys, query_pairs, a.dim, s);
            else
                for (int d = 0; d < a.dim; d++) {
                    const f32s k = load_cached<C>(keys + (size_t)d * 16 * size);
                    for (int q = 0; q < Q; q++) s[q] += k * queries[d][q];
                }
            const i32s place = token + numbers;
            for (int q = 0; q < Q; q++) {
                f32s v = s[q] * a.scale;
                if (a.softcap > 0) v = a.softcap * hyperbolic_tangent(v / a.softcap);
                v = place < a.length[start + q] ? v : splat(-INFINITY);
                v = place >= a.first[start + q] ? v : splat(-INFINITY);
                store(&scores[q][token - base], v);
                peak[q] = max(peak[q], v);
            }
        }
        const int span = (end - base + kLanes - 1) / kLanes * kLanes;
        for (int q = 0; q < Q; q++) {
            const float top = max_of(peak[q]);
            const float best = top > most[q] ? top : most[q];
            const bool any = best > -INFINITY;
            const float shrink = any ? std::exp(most[q] - best) : 1;
            f32s sum{};
            for (int i = 0; i < span; i += kLanes) {
                const f32s v = load<f32s>(&scores[q][i]);
                f32s p = exponential(v - (any ? best : 0));
                p = v == -INFINITY ? f32s{} : p;
                store(&scores[q][i], p);
                sum += p;
            }
            total[q] = total[q] * shrink + sum_of(sum);
            most[q] = best;
            if (shrink != 1)
                for (int c = 0; c < chunks; c++) {
                    float* out = a.output + (size_t)(start + q) * a.dim + kLanes * c;
                    store(out, load<f32s>(out) * shrink);
                }
            if constexpr (Paired) {
                to_bfloat16(scores[q], span, halves);
                for (int i = 0; i < span / 2; i++) pairs[i][q] = load<uint32_t>(halves + 2 * i);
            }
        }
        if constexpr (Paired) {
            add_pairs<Q>(a, start, base, end, all_from, all_stop, pairs);
            continue;
        }
        for (int c = 0; c < chunks; c++) {
            f32s sum[Q];
            for (int q = 0; q < Q; q++) sum[q] = load<f32s>(a.output + (size_t)(start + q) * a.dim + kLanes * c);
            for (int token = base; token < end; token += 16) {
                const uint8_t* values = a.pool + (size_t)a.table[token / a.block_size] * block + part * (a.heads + a.head) +
                                        ((size_t)(token % a.block_size) * a.dim + kLanes * c) * size;
                const int count = end - token < 16 ? end - token : 16;
                for (int t = 0; t < count; t++) {
                    const f32s v = load_cached<C>(values + (size_t)t * a.dim * size);
                    // A score of 0 would not keep out a value that is not finite.
                    if (token + t >= all_from && token + t < all_stop)
                        for (int q = 0; q < Q; q++) sum[q] += v * scores[q][token - base + t];
                    else
                        for (int q = 0; q < Q; q++)
                            if (token + t >= a.first[start + q] && token + t < a.length[start + q])
                                sum[q] += v * scores[q][token - base + t];
                }
            }
            for (int q = 0; q < Q; q++) store(a.output + (size_t)(start + q) * a.dim + kLanes * c, sum[q]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int c = 0; c < chunks; c++) {
            float* out = a.output + (size_t)(start + q) * a.dim + kLanes * c;
            store(out, load<f32s>(out) * (1 / total[q]));
        }
}

template <Cache C, bool Paired = false> void attend_cache(const Attention& a) {
    int done = 0;
    for (; done + kQueries <= a.count; done += kQueries) attend_queries<C, Paired, kQueries>(a, done);
    for (; done + 8 <= a.count; done += 8) attend_queries<C, Paired, 8>(a, done);
    for (; done + 4 <= a.count; done += 4) attend_queries<C, Paired, 4>(a, done);
    if (a.count - done == 3) attend_queries<C, Paired, 3>(a, done), done += 3;
    if (a.count - done == 2) attend_queries<C, Paired, 2>(a, done), done += 2;
    if (done < a.count) attend_queries<C, Paired, 1>(a, done);
}

void attend(const Attention& a) {
    switch (a.cache) {
        case Cache::F32: return attend_cache<Cache::F32>(a);
        case Cache::F16: return attend_cache<Cache::F16>(a);
        case Cache::BF16:
            return a.dim % (2 * kLanes) == 0 ? attend_cache<Cache::BF16, kPairs>(a) : attend_cache<Cache::BF16>(a);
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
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
        true,
#else
        false,
#endif
#if defined(__AMX_BF16__)
        4,
#else
        2,
#endif
        multiply, to_codes, to_bfloat16, row_of, norm, gated, finish, attend,
    };
    return &kernels;
}

}  // namespace modelpack
