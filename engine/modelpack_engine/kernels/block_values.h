  // The values of weights in block types (blocks.h): each thread writes eight consecutive ones, and
  // threadgroups of NSG simdgroups follow each other along the rows.
  //   weight [N, words of a row] uint   out [N, K] T
  typedef PaVec<T, 8> Eight;
  constexpr int THREADS = NSG * 32, BYTES = BLOCK * (LOW + HIGH) / 8 + BLOCK * Scales::ALL / 256;
  const int words = weight_shape[1], K = words * 4 / BYTES * BLOCK, highs = K / 32 * LOW;
  const int scales_at = highs + K / 32 * HIGH;
  const int groups = (K / 8 + THREADS - 1) / THREADS, row = PA_X / groups;
  const int eight = PA_X % groups * THREADS + PA_SIMD * 32 + PA_LANE;
  if (eight < K / 8) {
    const PA_DEVICE unsigned int* line = weight + (size_t)row * words;
    const PA_DEVICE unsigned char* scales = (const PA_DEVICE unsigned char*)(line + scales_at);
    const int unit = eight / 4, part = eight % 4 * 8 / GROUP;
    const PA_DEVICE H* given = (const PA_DEVICE H*)(scales + Scales::factors_at(unit));
    const PA_DEVICE unsigned char* of = scales + Scales::bytes_at(unit);
    const unsigned int bytes = !SCALED ? 0u : Scales::BYTES == 2 ? *(const PA_DEVICE unsigned short*)of : of[0];
    const float scale = Scales::scale(EXPONENT ? 1.0f : float(given[0]), bytes, part);
    const float offset = Scales::offset(MINS ? float(given[1]) : 0.0f, bytes, part);
    Eight y;
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int pair = eight * 4 + i;
      const unsigned int high = HIGH > 0 ? line[highs + pair * HIGH / 16] : 0u;
      const unsigned int two = Codes::codes(line[pair * LOW / 16], high, pair);
      const float one = VALUES ? pa_value_of<(EXPONENT > 0)>(two & 15u) : float((int)(two & 255u) - ZERO);
      const float other = VALUES ? pa_value_of<(EXPONENT > 0)>(two >> 16) : float((int)(two >> 16) - ZERO);
      y.e[2 * i] = T(scale * one + offset);
      y.e[2 * i + 1] = T(scale * other + offset);
    }
    ((PA_DEVICE Eight*)out)[(size_t)row * (K / 8) + Codes::eight(unit, eight % 4)] = y;
  }
