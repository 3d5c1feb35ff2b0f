  // The values of weights in GGUF's block types (blocks.h): each thread writes eight consecutive ones.
  //   weight [N, words of a row] uint   out [N, K] T
  typedef PaBlocks<LOW, HIGH> Codes;
  typedef PaScales<GROUP, SCALED, MINS> Scales;
  typedef PaVec<T, 8> Eight;
  constexpr int PER = K / 8, HIGHS = K / 32 * LOW, AT = HIGHS + K / 32 * HIGH, FACTORS = MINS ? 2 : 1;
  constexpr int BYTES_AT = (SCALED ? K / 256 : K / 32) * FACTORS;
  constexpr bool TWO = GROUP == 16 || MINS;  // bytes of 32 weights
  const int at = PA_THREAD;
  if (at < weight_shape[0] * PER) {
    const PA_DEVICE unsigned int* line = weight + (size_t)(at / PER) * weight_shape[1];
    const PA_DEVICE H* given = (const PA_DEVICE H*)(line + AT);
    const int eight = at % PER, unit = eight / 4, block = (SCALED ? unit / 8 : unit) * FACTORS;
    const unsigned int bytes = !SCALED ? 0u : TWO ? ((const PA_DEVICE unsigned short*)(given + BYTES_AT))[unit]
                                                  : ((const PA_DEVICE unsigned char*)(given + BYTES_AT))[unit];
    const int part = eight % 4 * 8 / GROUP;
    const float scale = Scales::scale(float(given[block]), bytes, part);
    const float offset = Scales::offset(float(given[block + FACTORS - 1]), bytes, part);
    Eight y;
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int pair = eight * 4 + i;
      const unsigned int high = HIGH > 0 ? line[HIGHS + pair * HIGH / 16] : 0u;
      const unsigned int two = Codes::codes(line[pair * LOW / 16], high, pair);
      const float one = TABLE ? pa_value_of(two & 15u) : float((int)(two & 255u) - ZERO);
      const float other = TABLE ? pa_value_of(two >> 16) : float((int)(two >> 16) - ZERO);
      y.e[2 * i] = T(scale * one + offset);
      y.e[2 * i + 1] = T(scale * other + offset);
    }
    ((PA_DEVICE Eight*)out)[at] = y;
  }
