  // Weights in block types, for strips.h: those of each chunk (block_chunk.h) become numbers of the type T.
  constexpr int VECTORS = 8, GROUPS = UNIT / GROUP;
  constexpr bool SUMMED = false;
  constexpr float FACTOR = Scaled::WHOLE;
  // The eights of a chunk are at places in the order of `Codes::eight`, its own inverse.
  auto vector_of = [&](int eight) { return eight / 16 * 4 + Codes::eight(eight / 4, eight % 4) % 4; };
  auto lane_of = [&](int eight) { return eight / 4 % 4; };
  auto eight_at = [&](int vector, int lane) { return Codes::eight(vector / 4 * 4 + lane, vector % 4); };
  auto arranged = [&](uint4 v) { return v; };
  auto multiply_unit = [&](const auto&, const unsigned char* stage, int unit, auto rows_of, auto, float (&acc)[4]) {
    const int first = (unit - warp) * UNIT;
    const unsigned char* scales = stage + SCALES_AT + first_scale(first) % 16;
    PA_UNROLL for (int half = 0; half < 2; half++) {
      const int at = warp * 8 + half * 4 + c;  // 32 weights of the stage
      Chunk chunk;
      PA_UNROLL for (int h = 0; h < 2; h++) {
        const int line = h * 8 + r;
        read_line(chunk, h, stage + line * LOW_PITCH + at * 4 * LOW, stage + HIGH_AT + line * HIGH_PITCH + at * 4 * HIGH,
                  scales + line * SCALE_PITCH, at);
      }
      float(&only)[1][4] = *(float(*)[1][4])&acc;
      multiply_chunk(chunk, [&](int, int e) { return rows_of(half * 4 + e); }, only);
    }
  };
