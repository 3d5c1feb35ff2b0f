// Packing: copy weights from the layouts of files into tiles (see kernels.hpp).
#pragma once

#include "kernels.hpp"

namespace modelpack {

// The layouts of files: ggml's blocks (ggml-common.h), and rows of numbers.
enum class Source : int32_t {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K,
    F32_AS_INT8,  // rows of floats, rounded to 8 bits in groups of 32
};

// Whether the source is known and has whole blocks in `columns`; then also the kind of the tiles.
bool kind_of(Source source, int columns, Kind* kind);

// The bytes of a row in the file.
size_t row_bytes(Source source, int columns);

// Write tile `tile` of `matrix` from rows that follow one another in `data`.
void pack_tile(const Matrix& matrix, Source source, const uint8_t* data, int tile);

// MLX's affine codes: value = scale * code + bias. A row's codes of `bits` bits follow one another, the
// first in the lowest bits; a scale and a bias are for `group` columns.
struct Affine {
    int bits, group;
    Source type;  // of scales and biases: F32, F16 or BF16
    const uint8_t *codes, *scales, *biases;
};

// Whether the library reads such codes; then also the kind of the tiles.
bool kind_of(const Affine& from, int columns, Kind* kind);

void pack_tile(const Matrix& matrix, const Affine& from, int tile);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);

}  // namespace modelpack
