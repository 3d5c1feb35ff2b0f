  // Affine quantised weights of 4 or 8 BITS, for strips.h: codes are multiplied, and sums of a group are scaled.
  //   weight [N, K * BITS / 32] uint, low bits first   scales, biases [N, K / GROUP] T
  constexpr int VECTORS = 8, GROUPS = UNIT / GROUP, AT_A_TIME = GROUPS < 4 ? GROUPS : 4;
  constexpr int BYTES = UNIT * BITS / 8, PART = GROUP * BITS / 8;  // of a unit and of a group
  constexpr int PIECE = PART / 4, WORDS = PIECE / 4;   // bytes and words that a lane reads of a group
  constexpr int EIGHTS = GROUP / 8, RUN = EIGHTS / 4;  // eights of inputs of a group, and of a lane
  // Lines of a stage are as far apart as lets eight of them be read at the same time.
  constexpr int PITCH = WARPS * BYTES + (PART < 128 ? PART : 16), SCALES = WARPS * GROUPS * 2;
  constexpr int SCALE_PITCH = SCALES / 16 % 2 ? SCALES : SCALES + 16;
  constexpr int STAGE = 16 * PITCH + 32 * SCALE_PITCH;
  constexpr bool SUMMED = true;
  typedef PaPairs<T, BITS> Pairs;
  constexpr float FACTOR = Pairs::WHOLE;
  auto line_bytes = [&](int, int units) { return units * (BYTES + 4 * GROUPS); };
  auto copy_piece = [&](unsigned char* stage, int line, int piece, size_t row, int k, int units, PaBarrier* barrier) {
    const size_t width = weight_shape[1] * (32 / BITS);
    if (piece == 0) {
      const unsigned char* from = (const unsigned char*)weight + (row * width + k) * BITS / 8;
      pa_bulk_copy(stage + line * PITCH, from, units * BYTES, barrier);
    } else if (piece < 3) {
      unsigned char* to = stage + 16 * PITCH + ((piece - 1) * 16 + line) * SCALE_PITCH;
      const T* from = (piece == 1 ? scales : biases) + row * (width / GROUP) + k / GROUP;
      pa_bulk_copy(to, from, units * GROUPS * 2, barrier);
    }
  };
  // Eights of a row are in the pairs in which codes are.
  auto vector_of = [&](int eight) { return eight / EIGHTS * RUN + eight % RUN; };
  auto lane_of = [&](int eight) { return eight % EIGHTS / RUN; };
  auto eight_at = [&](int vector, int lane) { return vector / RUN * EIGHTS + lane * RUN + vector % RUN; };
  auto arranged = [&](uint4 v) {
    const unsigned one = BITS == 8 ? v.y : v.z, two = BITS == 8 ? v.z : v.y;
    return Pairs::rows({__byte_perm(v.x, one, 0x5410), __byte_perm(v.x, one, 0x7632),
                        __byte_perm(two, v.w, 0x5410), __byte_perm(two, v.w, 0x7632)});
  };
  auto multiply_unit = [&](const auto&, const unsigned char* stage, int, auto rows_of, auto sum_of, float (&acc)[4]) {
    const unsigned char* scales_of_unit = stage + 16 * PITCH + r * SCALE_PITCH + warp * GROUPS * 2;
    // Scales of AT_A_TIME groups: those of eight take too many registers.
    PaVec<T, AT_A_TIME> by[2];
    PA_UNROLL for (int g = 0; g < GROUPS; g++) {
      PA_UNROLL for (int high = 0; g % AT_A_TIME == 0 && high < 2; high++) {
        by[high] = *(const PaVec<T, AT_A_TIME>*)(scales_of_unit + high * 8 * SCALE_PITCH + g * 2);
      }
      PaVec<unsigned, WORDS> codes[2];
      PA_UNROLL for (int high = 0; high < 2; high++) {
        codes[high] = *(const PaVec<unsigned, WORDS>*)(stage + (high * 8 + r) * PITCH + warp * BYTES
            + g * PART + c * PIECE);
      }
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      PA_UNROLL for (int e = 0; e < RUN; e++) {
        const uint4 b = rows_of(g * RUN + e);
        unsigned pairs[4][2];
        PA_UNROLL for (int high = 0; high < 2; high++) {
          PA_UNROLL for (int p = 0; p < 4; p++) {
            const unsigned word = codes[high].e[BITS == 8 ? e * 2 + p / 2 : e];
            pairs[p][high] = Pairs::numbers(word, BITS == 8 ? p % 2 : p);
          }
        }
        const unsigned one[4] = {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]};
        const unsigned two[4] = {pairs[2][0], pairs[2][1], pairs[3][0], pairs[3][1]};
        pa_mma<T>(sum, one, b.x, b.y);
        pa_mma<T>(sum, two, b.z, b.w);
      }
      PA_UNROLL for (int high = 0; high < 2; high++) {
        const float scale = float(by[high].e[g % AT_A_TIME]);
        PA_UNROLL for (int h = 0; h < (ROWS == 1 ? 1 : 2); h++) acc[high * 2 + h] += scale * sum[high * 2 + h];
      }
    }
    // Offsets are multiplied by the rows' sums on tensor cores, too, as numbers that have the range of sums.
    const unsigned char* offsets = scales_of_unit + 16 * SCALE_PITCH + c * 2 % GROUPS * 2;
    const uint2 sums = sum_of();
    float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    PA_UNROLL for (int part = 0; part < Pairs::OFFSET_PARTS; part++) {
      const unsigned low = Pairs::offsets(*(const unsigned*)offsets, part);
      const unsigned high = Pairs::offsets(*(const unsigned*)(offsets + 8 * SCALE_PITCH), part);
      const unsigned twice[4] = {low, high, low, high};
      pa_mma<__nv_bfloat16>(products, twice, sums.x, sums.y);
    }
    PA_UNROLL for (int i = 0; i < 4; i++) acc[i] += 1.0f / Pairs::WHOLE * products[i];
  };
