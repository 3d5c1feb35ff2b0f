// A word moved to the left, or by less than 0 to the right.
PA_FUNCTION unsigned int pa_moved(unsigned int word, int by) {
  return by < 0 ? word >> (by < 0 ? -by : 0) : word << (by < 0 ? 0 : by);
}

// Weights in block types, GGUF's and floats of 4 bits, as layers/blocks.py lays them out. A row of K weights has a plane
// of LOW bits of each code, one of HIGH bits, and one of scales: for each 256 weights, bytes of groups, then factors
// (float16). A word of the first two has 32 / BITS codes. Those of weights 2 i and 2 i + 1 are 16 bits apart, so that both
// are read at once. Pairs i and i + 2 of an eight are 8 bits apart, so that codes of four weights are read at once, too.
// Of FLOATS, the signs of a pair are apart from the other bits (`place`).
template <int LOW, int HIGH, bool FLOATS>
struct PaBlocks {
  enum { UPPER = HIGH > 0 ? HIGH : 1, LOWS = ((1 << LOW) - 1) * 0x10001, HIGHS = ((1 << HIGH) - 1) * 0x10001 };
  typedef PaVec<unsigned int, LOW> Low;     // of 32 weights
  typedef PaVec<unsigned int, UPPER> High;
  // The index of the eight weights of a row at place e of a unit of 32. The order of places differs between units:
  // so lanes with neighbouring units read inputs from different banks at the same time.
  static PA_FUNCTION int eight(int unit, int e) { return unit * 4 + (e ^ (unit >> 1 & 3)); }
  // Where the code of weight 2 i is in a word of a plane.
  static PA_FUNCTION int bit(int bits, int i) {
    return ((i >> 1 & 1) * (8 / bits) + (i >> 2) % (4 / bits) * 2 + (i & 1)) * bits;
  }
  // Where the exponent and mantissa of the float of weight 2 i are in a word, and its sign.
  static PA_FUNCTION int place(int i) { return i % 4 == 3 ? 9 : 6 - i % 4 * 3; }
  static PA_FUNCTION int sign(int i) { return i % 4 < 2 ? 15 - i % 4 * 3 : 16 - i % 4; }
  // The codes of weights 2 i and 2 i + 1 by the words that have them, in two halves.
  static PA_FUNCTION unsigned int codes(unsigned int low, unsigned int high, int i) {
    if (FLOATS) return (low >> place(i) & 0x70007u) | (low >> (sign(i) - 3) & 0x80008u);
    const unsigned int found = low >> bit(LOW, i) & (unsigned int)(LOWS);
    if (HIGH == 0) return found;
    return found | (pa_moved(high, LOW - bit(UPPER, i)) & (unsigned int)(HIGHS) << LOW);
  }
  static PA_FUNCTION unsigned int pair(Low low, High high, int i) {
    return codes(low.e[i * LOW / 16], HIGH > 0 ? high.e[i * HIGH / 16] : 0u, i);
  }
};

// A float of 8 bits, four of them the exponent.
PA_FUNCTION float pa_small_float(unsigned int bits) {
  const unsigned int size = bits & 127u;
  const float found = size < 8u ? float(size) * 0.001953125f : pa_float((size << 20) + 0x3c000000u);
  return bits > 127u ? -found : found;
}

// The scales and offsets of groups: the factor of a BLOCK of weights, times a number of a group if it is SCALED.
// The two bytes of 32 weights are numbers of two groups of 16 (with MINS, two of four bits each), or of a scale and
// an offset.
// EXPONENT: weights are floats (E2M1), there are no factors, and a group's byte is a scale with so many bits of exponent:
// 8 (E8M0) or 4 (E4M3).
template <int GROUP, int BLOCK, bool SCALED, bool MINS, int EXPONENT>
struct PaScales {
  // The factors of a block, the bytes of 32 weights, and those of 256 with their factors.
  enum { FACTORS = EXPONENT ? 0 : MINS ? 2 : 1, BYTES = !SCALED ? 0 : GROUP == 16 || MINS ? 2 : 1 };
  enum { ALL = 8 * BYTES + 256 / BLOCK * FACTORS * 2 };
  // Where the bytes of 32 weights are in a plane of scales, and the factors of their block.
  static PA_FUNCTION int bytes_at(int unit) { return unit / 8 * ALL + unit % 8 * BYTES; }
  static PA_FUNCTION int factors_at(int unit) {
    return unit / 8 * ALL + 8 * BYTES + unit % 8 / (BLOCK / 32) * FACTORS * 2;
  }
  static PA_FUNCTION float scale(float factor, unsigned int bytes, int part) {
    if (!SCALED) return factor;
    if (EXPONENT == 8) return factor * pa_float(bytes ? bytes << 23 : 0x400000u);
    if (EXPONENT == 4) return factor * pa_small_float(bytes >> (8 * part) & 255u);
    if (MINS) return factor * float(GROUP == 16 ? bytes >> (8 * part) & 15u : bytes & 255u);
    return factor * float((signed char)(bytes >> 8 * part));
  }
  static PA_FUNCTION float offset(float factor, unsigned int bytes, int part) {
    if (!MINS) return 0.0f;
    if (!SCALED) return factor;
    return factor * float(GROUP == 16 ? bytes >> (8 * part + 4) & 15u : bytes >> 8);
  }
};

// The 16 values of the codes of IQ4_NL and IQ4_XS: bytes, four in a word.
PA_FUNCTION unsigned int pa_four_values(unsigned int four) {
  return four < 2u ? (four ? 0xf6eaddcfu : 0xbfad9881u) : (four == 2u ? 0x26190d01u : 0x71594535u);
}
// The value of such a code, or of a float of 4 bits.
template <bool FLOATS>
PA_FUNCTION float pa_value_of(unsigned int code) {
  if (!FLOATS) return float((int)(pa_four_values(code >> 2) << (24u - (code & 3u) * 8u)) >> 24);
  const unsigned int size = code & 7u;
  const float found = size < 2u ? 0.5f * float(size) : pa_float((size << 22) + 0x3f000000u);
  return code > 7u ? -found : found;
}
