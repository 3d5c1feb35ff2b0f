  // Matmuls with weights in GGUF's block types (blocks.h) on tensor cores; CUDA only. Weights go from memory to
  // registers, where they become numbers of the type T.
  //   x [M, K] T   weight [N, words of a row] uint   bias [N] T (BIAS)   out [M, N] O
  // EXPERTS: rows are sorted by expert, and a block has those of a span: its expert, first row and number of rows.
  // With GATHER, row i is source[i] of x.
  //   weight [experts, N, words]   bias [experts, N]   spans [blocks, 3]   source [rows]   out [rows, N]
  // A block computes 16 outputs of TILES * 8 rows; its WARPS share the inputs, in chunks of 128. In a chunk, lane
  // (r, c) has the 32 weights from c * 32 on of outputs r and r + 8, and as many inputs of row r of each tile.
  // Sums may have any order, so the tensor cores' inputs 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 are four of these 32.
  typedef PaBlocks<LOW, HIGH> Codes;
  typedef PaScales<GROUP, SCALED, MINS, EXPONENTS> Scales;
  typedef typename Codes::Low Low;
  typedef typename Codes::High High;
  typedef PaCodes<T, 4> Numbers;
  constexpr int FACTORS = Scales::FACTORS, PARTS = 32 / GROUP;
  constexpr bool TWO = GROUP == 16 || MINS;  // bytes of 32 weights
  const int K = x_shape[1], N = weight_shape[EXPERTS ? 1 : 0], words = weight_shape[EXPERTS ? 2 : 1], units = K / 32;
  const int lane = PA_LANE, warp = PA_SIMD, r = lane / 4, c = lane % 4, chunks = (units + 3) / 4;
  const int output0 = PA_X * 16, row0 = EXPERTS ? spans[PA_Y * 3 + 1] : PA_Y * (TILES * 8);
  const int M = EXPERTS ? row0 + spans[PA_Y * 3 + 2] : x_shape[0];
  if (row0 >= M) return;  // a span that is not used
  const size_t of_expert = EXPERTS ? (size_t)spans[PA_Y * 3] * N : 0;
  const int highs = K / 32 * LOW, factors = highs + K / 32 * HIGH;
  const int bytes_at = K / BLOCK * FACTORS;
  PA_SHARED(unsigned, values, 16);
  if (TABLE) {
    if (warp == 0 && lane < 16) values[lane] = pa_pack<T>(pa_value_of<TABLE>(lane), 0.0f);
    PA_SYNC();
  }
  float acc[TILES][4];
  PA_UNROLL for (int i = 0; i < TILES * 4; i++) acc[i / 4][i % 4] = 0.0f;
  const unsigned offsets = pa_pack<T>(Numbers::OFFSET + ZERO, Numbers::OFFSET + ZERO);
  for (int from = warp; from < chunks; from += WARPS * AHEAD) {
    // Load all, then compute: loads wait for memory together.
    Low low[AHEAD][2];
    High high[AHEAD][2];
    unsigned bytes[AHEAD][2];
    float factor[AHEAD][2], least[AHEAD][2];
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int there = (from + a * WARPS) * 4 + c, unit = there < units ? there : 0;
      PA_UNROLL for (int h = 0; h < 2; h++) {
        const int output = output0 + h * 8 + r;
        const unsigned* line = weight + (of_expert + (output < N ? output : N - 1)) * words;
        low[a][h] = ((const Low*)line)[unit];
        if (HIGH > 0) high[a][h] = ((const High*)(line + highs))[unit];
        const H* given = (const H*)(line + factors);
        const int block = unit / (BLOCK / 32) * FACTORS;
        factor[a][h] = EXPONENTS ? 1.0f : float(given[block]);
        least[a][h] = MINS ? float(given[block + 1]) : 0.0f;
        bytes[a][h] = !SCALED ? 0u : TWO ? ((const unsigned short*)(given + bytes_at))[unit]
                                         : ((const unsigned char*)(given + bytes_at))[unit];
      }
    }
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int there = (from + a * WARPS) * 4 + c, unit = there < units ? there : 0;
      unsigned scale[2][PARTS], offset[2][PARTS];
      PA_UNROLL for (int h = 0; h < 2; h++) {
        PA_UNROLL for (int part = 0; part < PARTS; part++) {
          const float by = Scales::scale(factor[a][h], bytes[a][h], part);
          const float plus = Scales::offset(least[a][h], bytes[a][h], part);
          scale[h][part] = pa_pack<T>(by, by), offset[h][part] = pa_pack<T>(plus, plus);
        }
      }
      PA_UNROLL for (int e = 0; e < 4; e++) {
        unsigned numbers[4][2];
        PA_UNROLL for (int i = 0; i < 4; i++) {
          PA_UNROLL for (int h = 0; h < 2; h++) {
            const unsigned two = Codes::pair(low[a][h], high[a][h], e * 4 + i);
            const unsigned number = TABLE ? values[two & 15u] | values[two >> 16] << 16 : two | Numbers::OFFSETS;
            numbers[i][h] = pa_affine<T>(number, TABLE ? 0u : offsets, scale[h][e * 8 / GROUP], offset[h][e * 8 / GROUP]);
          }
        }
        const unsigned one[4] = {numbers[0][0], numbers[0][1], numbers[1][0], numbers[1][1]};
        const unsigned two[4] = {numbers[2][0], numbers[2][1], numbers[3][0], numbers[3][1]};
        PA_UNROLL for (int n = 0; n < TILES; n++) {
          const int row = row0 + n * 8 + r, from_row = GATHER && row < M ? source[row] : row;
          uint4 b = {0, 0, 0, 0};
          if (row < M && there < units) b = ((const uint4*)x)[(size_t)from_row * (K / 8) + Codes::eight(unit, e)];
          pa_mma<T>(acc[n], one, b.x, b.y);
          pa_mma<T>(acc[n], two, b.z, b.w);
        }
      }
    }
  }
  // The warps' sums, by row and output.
  PA_SHARED(float, sums, WARPS * TILES * 128);
  PA_UNROLL for (int i = 0; i < TILES * 4; i++) {
    sums[(warp * TILES * 8 + i / 4 * 8 + c * 2 + i % 2) * 16 + i % 4 / 2 * 8 + r] = acc[i / 4][i % 4];
  }
  PA_SYNC();
  for (int i = warp * 32 + lane; i < TILES * 128; i += WARPS * 32) {
    const int row = row0 + i / 16, output = output0 + i % 16;
    if (row < M && output < N) {
      float y = BIAS ? float(bias[of_expert + output]) : 0.0f;
      PA_UNROLL for (int w = 0; w < WARPS; w++) y += sums[w * TILES * 128 + i];
      out[(size_t)row * N + output] = O(y);
    }
  }
