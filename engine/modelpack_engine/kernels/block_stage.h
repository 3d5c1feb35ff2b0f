  // Units of weights in GGUF's block types (blocks.h), for strips.h: how they are copied to a stage.
  //   weight [N, words of a row] uint
  // DIGITS: a lane reads a word at a time of a plane, otherwise all those of 32 weights.
  // The bytes of a unit in each plane of a stage: low and high bits of codes, factors and scales. Lines of a plane are
  // as far apart as lets lanes read at the same time; those of factors and scales begin with up to 15 other bytes, as
  // whole 16 bytes are copied.
  constexpr int LOWS = 32 * LOW, HIGHS = 32 * HIGH, HALVES = UNIT / BLOCK * Scales::FACTORS * 2, BYTES = 8 * Scales::BYTES;
  constexpr int LOW_PITCH = WARPS * LOWS + (DIGITS ? 16 : 16 * LOW);
  constexpr int HIGH_PITCH = HIGH > 0 ? WARPS * HIGHS + (DIGITS ? 16 : 16 * HIGH) : 0;
  constexpr int FACTOR_PITCH = (WARPS * HALVES + 47) / 16 * 16, BYTE_PITCH = (WARPS * BYTES + 47) / 16 * 16;
  constexpr int HIGH_AT = 16 * LOW_PITCH, FACTORS_AT = HIGH_AT + 16 * HIGH_PITCH;
  constexpr int BYTES_AT = FACTORS_AT + 16 * FACTOR_PITCH, STAGE = BYTES_AT + 16 * BYTE_PITCH;
  // Where factors and scales of a row begin, in bytes, and how many are before those from input k on.
  const int factors_at = D * PA_DEPTH / 8 * (LOW + HIGH), bytes_at = factors_at + D * PA_DEPTH / BLOCK * Scales::FACTORS * 2;
  auto first_factor = [&](int k) { return factors_at + k / BLOCK * Scales::FACTORS * 2; };
  auto first_byte = [&](int k) { return bytes_at + k / 32 * Scales::BYTES; };
  auto whole_bytes = [&](int from, int bytes) { return (from % 16 + bytes + 15) / 16 * 16; };
  auto line_bytes = [&](int k, int units) {
    return units * (LOWS + HIGHS) + (Scales::FACTORS > 0 ? whole_bytes(first_factor(k), units * HALVES) : 0)
        + (SCALED ? whole_bytes(first_byte(k), units * BYTES) : 0);
  };
  auto copy_piece = [&](unsigned char* stage, int line, int piece, size_t row, int k, int units, PaBarrier* barrier) {
    const unsigned char* from = (const unsigned char*)(weight + row * weight_shape[1]);
    if (piece == 0) {
      pa_bulk_copy(stage + line * LOW_PITCH, from + k / 8 * LOW, units * LOWS, barrier);
    } else if (piece == 1) {
      if (HIGH == 0) return;
      const unsigned char* highs = from + D * PA_DEPTH / 8 * LOW + k / 8 * HIGH;
      pa_bulk_copy(stage + HIGH_AT + line * HIGH_PITCH, highs, units * HIGHS, barrier);
    } else if (piece == 2 ? Scales::FACTORS > 0 : SCALED) {
      const int at = piece == 2 ? first_factor(k) : first_byte(k), bytes = units * (piece == 2 ? HALVES : BYTES);
      unsigned char* to = stage + (piece == 2 ? FACTORS_AT + line * FACTOR_PITCH : BYTES_AT + line * BYTE_PITCH);
      pa_bulk_copy(to, from + at / 16 * 16, whole_bytes(at, bytes), barrier);
    }
  };
