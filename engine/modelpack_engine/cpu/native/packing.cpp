#include "packing.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace modelpack {
namespace {

template <class T> T read(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T> void write(uint8_t* to, T value) { std::memcpy(to, &value, sizeof value); }
float half_at(const uint8_t* from) { return half_to_float(read<uint16_t>(from)); }

// 32 columns of a row. value = scale * (code - bias of the kind) + minimum (INT4 only); INT6 has a
// scale for each 16 columns.
struct Group {
    uint8_t codes[kGroup];
    float scale[2];
    float minimum;
};

// The scale and minimum of group `index` of 8 in a block of Q4_K, in 6 bits each.
void scale_of_q4_k(const uint8_t* packed, int index, int* scale, int* minimum) {
    if (index < 4) {
        *scale = packed[index] & 63;
        *minimum = packed[index + 4] & 63;
    } else {
        *scale = (packed[index + 4] & 15) | (packed[index - 4] >> 6) << 4;
        *minimum = (packed[index + 4] >> 4) | (packed[index] >> 6) << 4;
    }
}

void nibbles(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = from[i] & 15;
        codes[i + 16] = from[i] >> 4;
    }
}

void read_group(Source source, const uint8_t* row, int group, Group* out) {
    out->minimum = out->scale[1] = 0;
    switch (source) {
        case Source::Q4_0: {
            const uint8_t* block = row + (size_t)group * 18;
            out->scale[0] = half_at(block);
            out->minimum = -8 * out->scale[0];
            return nibbles(block + 2, out->codes);
        }
        case Source::Q4_1: {
            const uint8_t* block = row + (size_t)group * 20;
            out->scale[0] = half_at(block);
            out->minimum = half_at(block + 2);
            return nibbles(block + 4, out->codes);
        }
        case Source::Q5_0: {
            const uint8_t* block = row + (size_t)group * 22;
            const uint32_t high = read<uint32_t>(block + 2);
            out->scale[0] = half_at(block);
            nibbles(block + 6, out->codes);
            for (int i = 0; i < kGroup; i++)
                out->codes[i] = (uint8_t)(out->codes[i] + (high >> i & 1) * 16 - 16 + 128);
            return;
        }
        case Source::Q8_0: {
            const uint8_t* block = row + (size_t)group * 34;
            out->scale[0] = half_at(block);
            for (int i = 0; i < kGroup; i++) out->codes[i] = block[2 + i] ^ 128;
            return;
        }
        case Source::Q4_K: {
            const uint8_t* block = row + (size_t)(group / 8) * 144;
            int scale, minimum;
            scale_of_q4_k(block + 4, group % 8, &scale, &minimum);
            out->scale[0] = half_at(block) * scale;
            out->minimum = -half_at(block + 2) * minimum;
            const uint8_t* codes = block + 16 + group % 8 / 2 * 32;
            for (int i = 0; i < kGroup; i++)
                out->codes[i] = group % 2 ? codes[i] >> 4 : codes[i] & 15;
            return;
        }
        case Source::Q6_K: {
            const uint8_t* block = row + (size_t)(group / 8) * 210;
            const float d = half_at(block + 208);
            const int half = group % 8 / 4, part = group % 4;  // of 128 columns, of 32
            const uint8_t* low = block + 64 * half + (part % 2) * 32;
            const uint8_t* high = block + 128 + 32 * half;
            for (int i = 0; i < kGroup; i++)
                out->codes[i] = (uint8_t)((part < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * part & 3) << 4);
            for (int i = 0; i < 2; i++)
                out->scale[i] = d * (int8_t)block[192 + 8 * half + 2 * part + i];
            return;
        }
        default: {  // F32_AS_INT8
            float values[kGroup], most = 0;
            std::memcpy(values, row + (size_t)group * kGroup * 4, sizeof values);
            for (float value : values) most = std::fmax(most, std::fabs(value));
            out->scale[0] = half_to_float(float_to_half(most / 127));
            const float inverse = out->scale[0] > 0 ? 1 / out->scale[0] : 0;
            for (int i = 0; i < kGroup; i++) {
                const float code = std::fmin(127, std::fmax(-127, std::nearbyint(values[i] * inverse)));
                out->codes[i] = (uint8_t)((int)code + 128);
            }
        }
    }
}

float number_at(Source type, const uint8_t* from, size_t index) {
    if (type == Source::F32) return read<float>(from + 4 * index);
    const uint16_t bits = read<uint16_t>(from + 2 * index);
    if (type == Source::F16) return half_to_float(bits);
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// 32 codes of up to 8 bits each, in as many words as they have bits.
void read_codes(int bits, const uint8_t* from, uint8_t* codes) {
    if (bits == 8) {
        std::memcpy(codes, from, kGroup);
        return;
    }
    if (bits == 4) {
        for (int i = 0; i < 16; i++) {
            codes[2 * i] = from[i] & 15;
            codes[2 * i + 1] = from[i] >> 4;
        }
        return;
    }
    uint64_t held = 0;
    for (int i = 0, count = 0; i < kGroup; i++, count -= bits, held >>= bits) {
        if (count < bits) {
            held |= (uint64_t)read<uint32_t>(from) << count;
            from += 4;
            count += 32;
        }
        codes[i] = held & ((1 << bits) - 1);
    }
}

// Write a lane of a group of a tile, four codes at a time.
void write_group(Kind kind, uint8_t* to, int lane, const Group& group) {
    uint32_t codes[8], *words = (uint32_t*)to + lane;
    std::memcpy(codes, group.codes, sizeof codes);
    const bool bytes = kind == Kind::INT8 || kind == Kind::UINT8;
    if (bytes) {
        for (int s = 0; s < 8; s++) words[kTile * s] = codes[s];
    } else {
        for (int s = 0; s < 4; s++) words[kTile * s] = (codes[s] & 0x0f0f0f0f) | (codes[s + 4] & 0x0f0f0f0f) << 4;
    }
    if (kind == Kind::INT6)
        for (int h = 0; h < 2; h++) {
            uint32_t high = 0;
            for (int i = 0; i < 4; i++) high |= (codes[4 * h + i] >> 4 & 0x03030303) << 2 * i;
            words[kTile * (4 + h)] = high;
        }
    uint8_t* scales = to + (bytes ? 512 : kind == Kind::INT6 ? 384 : 256);
    write(scales + 2 * lane, float_to_half(group.scale[0]));
    if (kind == Kind::INT4 || kind == Kind::UINT8) write(scales + 32 + 2 * lane, float_to_half(group.minimum));
    if (kind == Kind::INT6) write(scales + 32 + 2 * lane, float_to_half(group.scale[1]));
}

// Turn `lanes` rows of `count` numbers, or pairs of them, into [count][16]; 16 at a time, which stay
// in the nearest cache.
template <class T> void write_dense(uint8_t* to, const uint8_t* rows, size_t stride, int lanes, int count) {
    for (int from = 0; from < count; from += 16)
        for (int lane = 0; lane < lanes; lane++) {
            const uint8_t* row = rows + (size_t)lane * stride;
            for (int i = from; i < from + 16; i++)
                write(to + ((size_t)i * kTile + lane) * sizeof(T), read<T>(row + (size_t)i * sizeof(T)));
        }
}

}  // namespace

bool kind_of(Source source, int columns, Kind* kind) {
    const int whole = source == Source::Q4_K || source == Source::Q6_K ? 256 : kGroup;
    if (columns <= 0 || columns % whole) return false;
    switch (source) {
        case Source::F32: *kind = Kind::F32; return true;
        case Source::F16: *kind = Kind::F16; return true;
        case Source::BF16: *kind = Kind::BF16; return true;
        case Source::Q4_0:
        case Source::Q4_1:
        case Source::Q4_K: *kind = Kind::INT4; return true;
        case Source::Q6_K: *kind = Kind::INT6; return true;
        case Source::Q5_0:
        case Source::Q8_0:
        case Source::F32_AS_INT8: *kind = Kind::INT8; return true;
    }
    return false;
}

size_t row_bytes(Source source, int columns) {
    const size_t n = columns;
    switch (source) {
        case Source::F32:
        case Source::F32_AS_INT8: return n * 4;
        case Source::F16:
        case Source::BF16: return n * 2;
        case Source::Q4_0: return n / 32 * 18;
        case Source::Q4_1: return n / 32 * 20;
        case Source::Q5_0: return n / 32 * 22;
        case Source::Q8_0: return n / 32 * 34;
        case Source::Q4_K: return n / 256 * 144;
        case Source::Q6_K: return n / 256 * 210;
    }
    return 0;
}

void pack_tile(const Matrix& matrix, Source source, const uint8_t* data, int tile) {
    uint8_t* to = matrix.data + (size_t)tile * matrix.tile_bytes;
    const int lanes = std::min(kTile, matrix.rows - tile * kTile), columns = matrix.columns;
    const size_t stride = row_bytes(source, columns), group_bytes = tile_bytes(matrix.kind, kGroup);
    const uint8_t* rows = data + (size_t)tile * kTile * stride;
    if (lanes < kTile) std::memset(to, 0, matrix.tile_bytes);
    if (matrix.kind == Kind::F32) return write_dense<uint32_t>(to, rows, stride, lanes, columns);
    if (matrix.kind == Kind::F16) return write_dense<uint16_t>(to, rows, stride, lanes, columns);
    if (matrix.kind == Kind::BF16) return write_dense<uint32_t>(to, rows, stride, lanes, columns / 2);
    for (int g = 0; g < columns / kGroup; g++)
        for (int lane = 0; lane < lanes; lane++) {
            Group group;
            read_group(source, rows + (size_t)lane * stride, g, &group);
            write_group(matrix.kind, to + (size_t)g * group_bytes, lane, group);
        }
}

bool kind_of(const Affine& from, int columns, Kind* kind) {
    if (from.bits < 2 || from.bits > 8 || from.bits == 7 || from.group <= 0) return false;
    if (from.group % kGroup || columns <= 0 || columns % from.group) return false;
    if (from.type != Source::F32 && from.type != Source::F16 && from.type != Source::BF16) return false;
    *kind = from.bits <= 4 ? Kind::INT4 : Kind::UINT8;
    return true;
}

void pack_tile(const Matrix& matrix, const Affine& from, int tile) {
    uint8_t* to = matrix.data + (size_t)tile * matrix.tile_bytes;
    const int lanes = std::min(kTile, matrix.rows - tile * kTile), groups = matrix.columns / kGroup;
    const size_t group_bytes = tile_bytes(matrix.kind, kGroup);
    if (lanes < kTile) std::memset(to, 0, matrix.tile_bytes);
    for (int g = 0; g < groups; g++)
        for (int lane = 0; lane < lanes; lane++) {
            const size_t row = (size_t)tile * kTile + lane;
            const size_t at = row * (matrix.columns / from.group) + g * kGroup / from.group;
            Group group;
            read_codes(from.bits, from.codes + (row * groups + g) * from.bits * 4, group.codes);
            group.scale[0] = number_at(from.type, from.scales, at);
            group.minimum = number_at(from.type, from.biases, at);
            write_group(matrix.kind, to + (size_t)g * group_bytes, lane, group);
        }
}

float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, part = half & 1023;
    float value;
    if (exponent == 0) {
        value = part * 5.9604644775390625e-8f;  // 2^-24
    } else {
        const uint32_t bits = exponent == 31 ? 0x7f800000u | part << 13 : (exponent + 112) << 23 | part << 13;
        std::memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return sign | (uint16_t)std::nearbyint(magnitude * 16777216.0f);
    }
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace modelpack
