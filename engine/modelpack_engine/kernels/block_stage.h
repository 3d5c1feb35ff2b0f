  // Units of weights in block types (blocks.h), for strips.h: how they are copied to a stage.
  //   weight [N, words of a row] uint
  // DIGITS: a lane reads a word at a time of a plane, otherwise all those of 32 weights.
  // WHOLE: a stage has whole rows, each of which is copied at once. A multiprocessor begins a copy about every 45 clocks
  // (benchmarks/results/packed-h200.md).
  // The bytes of a unit in each plane of a stage: low and high bits of codes, and scales. Lines of a plane are as far apart
  // as lets lanes read at the same time; those of scales begin with up to 15 other bytes, as whole 16 bytes are copied.
  constexpr int LOWS = 32 * LOW, HIGHS = 32 * HIGH, APART = DIGITS ? 1 : LOW;
  constexpr int OF_ROW = (UNITS * (LOWS + HIGHS + Scales::ALL) + 15) / 16 * 16;
  constexpr int ROW_PITCH = (OF_ROW + 127) / 128 * 128 + 16 * APART;
  constexpr int LOW_PITCH = WHOLE ? ROW_PITCH : WARPS * LOWS + 16 * APART;
  constexpr int HIGH_PITCH = WHOLE ? ROW_PITCH : HIGH > 0 ? WARPS * HIGHS + 16 * (DIGITS ? 1 : HIGH) : 0;
  constexpr int SCALE_PITCH = WHOLE ? ROW_PITCH : (WARPS * Scales::ALL + 47) / 16 * 16;
  constexpr int HIGH_AT = WHOLE ? UNITS * LOWS : 16 * LOW_PITCH;
  constexpr int SCALES_AT = HIGH_AT + (WHOLE ? UNITS * HIGHS : 16 * HIGH_PITCH);
  constexpr int STAGE = WHOLE ? 16 * ROW_PITCH : SCALES_AT + 16 * SCALE_PITCH;
  // Where the scales of a row are from input k on, in bytes.
  auto first_scale = [&](int k) { return D * PA_DEPTH / 8 * (LOW + HIGH) + k / UNIT * Scales::ALL; };
  auto whole_bytes = [&](int from, int bytes) { return (from % 16 + bytes + 15) / 16 * 16; };
  auto line_bytes = [&](int k, int units) {
    return WHOLE ? OF_ROW : units * (LOWS + HIGHS) + whole_bytes(first_scale(k), units * Scales::ALL);
  };
  auto copy_piece = [&](unsigned char* stage, int line, int piece, size_t row, int k, int units, PaBarrier* barrier) {
    const unsigned char* from = (const unsigned char*)(weight + row * weight_shape[1]);
    if (WHOLE) {
      if (piece == 0) pa_bulk_copy(stage + line * ROW_PITCH, from, OF_ROW, barrier);
    } else if (piece == 0) {
      pa_bulk_copy(stage + line * LOW_PITCH, from + k / 8 * LOW, units * LOWS, barrier);
    } else if (piece == 1) {
      if (HIGH == 0) return;
      const unsigned char* highs = from + D * PA_DEPTH / 8 * LOW + k / 8 * HIGH;
      pa_bulk_copy(stage + HIGH_AT + line * HIGH_PITCH, highs, units * HIGHS, barrier);
    } else if (piece == 2) {
      const int at = first_scale(k);
      unsigned char* to = stage + SCALES_AT + line * SCALE_PITCH;
      pa_bulk_copy(to, from + at / 16 * 16, whole_bytes(at, units * Scales::ALL), barrier);
    }
  };
