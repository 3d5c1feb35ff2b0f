// The kernels of one instruction set, and the layouts that they share.
//
// A matrix of weights [rows, columns] is cut into tiles of 16 rows; the lanes of a vector are the
// rows of a tile. Four neighbouring bytes of a lane hold neighbouring columns, as the dot-product
// instructions of x86 (VNNI, AVX512_BF16, AMX) and Arm (SDOT, USDOT, BFDOT) want them:
//
//   F32    [columns][16]        float
//   F16    [columns][16]        half
//   BF16   [columns / 2][16][2] bfloat16
//   INT4   groups of 32 columns: 4 vectors of codes (column 4s + i of row r is the low nibble of
//          byte 4r + i of vector s, column 16 + 4s + i the high one), then scales and minima
//          half [16] each: value = scale * code + minimum
//   INT6   groups of 32 columns: 4 vectors of low nibbles as in INT4, 2 vectors of two high bits
//          (vector h holds those of columns 16h .. 16h + 15), then scales half [2][16], one for 16
//          columns: value = scale * (code - 32)
//   INT8   groups of 32 columns: 8 vectors of codes, then scales half [16]:
//          value = scale * (code - 128)
//   UINT8  as INT8, and then minima half [16]: value = scale * code + minimum
//
// Rows beyond the last of a matrix are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace modelpack {

constexpr int kTile = 16, kGroup = 32;

enum class Kind : int32_t { F32, F16, BF16, INT4, INT6, INT8, UINT8 };

struct Matrix {
    Kind kind;
    int32_t rows, columns, tiles;
    size_t tile_bytes;
    uint8_t* data;
};

inline size_t tile_bytes(Kind kind, int columns) {
    const size_t n = columns, groups = n / kGroup;
    switch (kind) {
        case Kind::F32: return n * kTile * 4;
        case Kind::F16:
        case Kind::BF16: return n * kTile * 2;
        case Kind::INT4: return groups * 320;
        case Kind::INT6: return groups * 448;
        case Kind::UINT8: return groups * 576;
        default: return groups * 544;
    }
}

// Rows of activations, as a kernel reads them. Each group of 32 columns has 32 coarse codes and then
// 32 fine ones, signed bytes: value = scale * (256 * coarse + fine). With coarse codes alone, as
// llama.cpp has them, small models say other things than in float32. `sums` has the sum of the
// values of each 16 columns.
struct Rows {
    const float* floats;
    const uint16_t* halves;  // bfloat16
    const int8_t* codes;
    const float* scales;
    const float* sums;
    int columns;
};

enum class Cache : int32_t { F32, F16, BF16 };

// Queries [count][dim] that share a head of keys and values; query i sees tokens
// [first[i], length[i]) of the blocks in `table`.
struct Attention {
    const float* queries;
    float* output;
    int count, dim, query_stride;
    const int32_t *first, *length;
    const int32_t* table;
    int block_size;
    const uint8_t* pool;  // [blocks][2][heads][block_size * dim]
    int heads, head;
    Cache cache;
    float scale, softcap;
    const float* sinks;  // one for each query, or null
};

constexpr int kQueries = 12;       // that attend together: their sums fit into 16 registers
constexpr int kLargestHead = 256;  // elements of a head

struct Kernels {
    const char* name;
    bool bfloat16;  // whether BF16 matrices read `Rows::halves`
    int tiles;      // that `multiply` takes at best with several rows
    // output [rows][tiles * 16] = rows x tiles [tile, tile + tiles) of the matrix; `scratch` has
    // room for 2 tiles of bytes. At most 4 tiles. `next`, or null, is where as many tiles are that the
    // thread will probably multiply with after these: they are brought to the cache meanwhile.
    void (*multiply)(const Matrix&, int tile, int tiles, const Rows&, int row, int rows,
                     float* output, uint8_t* scratch, const uint8_t* next);
    void (*to_codes)(const float* x, int columns, int8_t* codes, float* scales, float* sums);
    void (*to_bfloat16)(const float* x, int columns, uint16_t* out);
    void (*row_of)(const Matrix&, int row, float* out);
    void (*norm)(const float* x, const float* weight, int columns, float eps, float* out);
    void (*gated)(const float* gate, const float* up, int count, int activation, float* out);
    void (*finish)(const float* products, int stride, int count, int rows, float scale, bool adds, float* to,
                   size_t pitch);
    void (*attend)(const Attention&);
};

const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_neon_dot();
const Kernels* kernels_neon_bf16();

}  // namespace modelpack
