  // Weights in GGUF's block types, for strips.h, as bytes: codes are the highest bits of a byte, or a TABLE has the byte.
  // Rows are digits (digit_rows.h); sums are integers until factors are multiplied.
  constexpr int BITS = LOW + HIGH, SHIFT = TABLE ? 0 : 8 - BITS;
  constexpr bool SIGNED = TABLE || ZERO, IN_TURN = TABLE;
  constexpr float FACTOR = 1.0f;
  static_assert(EXPONENT == 0, "floats are no integers");
  static_assert(ZERO == 0 || ZERO == 1 << (BITS - 1), "with the highest bit turned, codes are signed");
  typedef PaPlane<LOW, TABLE ? 0 : SHIFT> Lows;
  typedef PaPlane<HIGH == 0 ? 1 : HIGH, 8 - HIGH> Highs;
  auto place_of = [&](int eight) { return Codes::eight(eight / 4, eight % 4); };
  auto multiply_unit = [&](const auto& own, const unsigned char* stage, int unit, auto rows_of, auto sum_of, auto& acc) {
    constexpr int TILES = sizeof(acc) / 8;
    const int first = (unit - warp) * UNIT;
    const unsigned char* scales = stage + SCALES_AT + first_scale(first) % 16;
    int whole[TILES][4] = {};
    float sums[TILES * 2] = {}, offsets[TILES * 2] = {}, least[TILES * 2] = {};
    PA_UNROLL for (int i = 0; i < 8; i++) {  // 32 weights of each output
      const int at = warp * 8 + i;
      const bool last = (i + 1) % (BLOCK / 32) == 0;
      unsigned codes[4];
      int number[2] = {}, other[2] = {};
      float factor[2] = {}, offset[2] = {};
      PA_UNROLL for (int h = 0; h < 2; h++) {
        const int line = h * 8 + r;
        const unsigned low = Lows::word(stage + line * LOW_PITCH + warp * LOWS, i, c);
        if constexpr (TABLE) {
          PA_UNROLL for (int j = 0; j < 2; j++) codes[j * 2 + h] = pa_bytes_of_table(low, j);
        } else {
          const unsigned turned = !ZERO ? 0u : HIGH == 0 ? Lows::HIGHEST : Highs::HIGHEST;
          const unsigned high = HIGH == 0 ? 0u : Highs::word(stage + HIGH_AT + line * HIGH_PITCH + warp * HIGHS, i, c) ^ turned;
          PA_UNROLL for (int j = 0; j < 2; j++) {
            codes[j * 2 + h] = Lows::bytes(HIGH == 0 ? low ^ turned : low, j) | (HIGH == 0 ? 0u : Highs::bytes(high, j));
          }
        }
        const unsigned char* scale = scales + line * SCALE_PITCH + Scales::bytes_at(at);
        if (SCALED) number[h] = MINS ? scale[GROUP == 16 ? c / 2 : 0] : ((const signed char*)scale)[GROUP == 16 ? c / 2 : 0];
        if (MINS && SCALED) other[h] = GROUP == 16 ? number[h] >> 4 : scale[1];
        if (MINS && SCALED && GROUP == 16) number[h] &= 15;
        if (last) {
          const H* of = (const H*)(scales + line * SCALE_PITCH + Scales::factors_at(at));
          factor[h] = float(of[0]);
          if (MINS) offset[h] = float(of[1]);
        }
      }
      PA_UNROLL for (int t = 0; t < TILES; t++) {
        int sum[4];
        const uint2 row = rows_of(t * 8 + i);
        pa_mma_bytes<SIGNED>(sum, codes, row.x, row.y);
        const float group = MINS ? sum_of(i, t) : 0.0f;
        PA_UNROLL for (int h = 0; h < 2; h++) {
          PA_UNROLL for (int j = h * 2; j < h * 2 + 2; j++) whole[t][j] = SCALED ? whole[t][j] + number[h] * sum[j] : sum[j];
          if (MINS) least[t * 2 + h] += SCALED ? float(other[h]) * group : group;
          if (last) {  // of the factor's weights; sums of 32 products and 256 times as much are in 32 bits
            const int low = whole[t][h * 2], high = whole[t][h * 2 + 1];
            sums[t * 2 + h] += factor[h] * (SCALED ? float(low) + 256.0f * float(high) : float(low + 256 * high));
            if (MINS) offsets[t * 2 + h] += offset[h] * least[t * 2 + h];
            whole[t][h * 2] = whole[t][h * 2 + 1] = 0, least[t * 2 + h] = 0.0f;
          }
        }
      }
    }
    PA_UNROLL for (int s = 0; s < TILES * 2; s++) acc[s] += own.steps[s / 2] * sums[s] + offsets[s];
  };
