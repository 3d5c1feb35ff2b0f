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
  typedef PaScaled<T, ZERO, (TABLE > 0)> Scaled;
  constexpr int FACTORS = Scales::FACTORS, PARTS = 32 / GROUP;
  constexpr bool TWO = GROUP == 16 || MINS;  // bytes of 32 weights
  const int K = x_shape[1], N = weight_shape[EXPERTS ? 1 : 0], words = weight_shape[EXPERTS ? 2 : 1], units = K / 32;
  const int lane = PA_LANE, warp = PA_SIMD, r = lane / 4, c = lane % 4, chunks = (units + 3) / 4;
  PA_LET_NEXT_START();
  if (EXPERTS) PA_WAIT_FOR_BEFORE();
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
  // What a lane has of a chunk's weights, for outputs r and r + 8.
  struct Chunk {
    Low low[2];
    High high[2];
    unsigned bytes[2];
    float factor[2], least[2];
  } ahead[AHEAD];
  const unsigned* lines[2];
  PA_UNROLL for (int h = 0; h < 2; h++) {
    const int output = output0 + h * 8 + r;
    lines[h] = weight + (of_expert + (output < N ? output : N - 1)) * words;
  }
  auto fetch = [&](Chunk& chunk, int at) {
    const unsigned unit = at * 4 + c < units ? at * 4 + c : 0;
    PA_UNROLL for (int h = 0; h < 2; h++) {
      chunk.low[h] = ((const Low*)lines[h])[unit];
      if (HIGH > 0) chunk.high[h] = ((const High*)(lines[h] + highs))[unit];
      const H* given = (const H*)(lines[h] + factors);
      const unsigned block = unit / (BLOCK / 32) * FACTORS;
      chunk.factor[h] = EXPONENTS ? Scaled::GAIN : float(given[block]) * Scaled::GAIN;
      chunk.least[h] = MINS ? float(given[block + 1]) * Scaled::LOSS : 0.0f;
      chunk.bytes[h] = !SCALED ? 0u : TWO ? ((const unsigned short*)(given + bytes_at))[unit]
                                          : ((const unsigned char*)(given + bytes_at))[unit];
    }
  };
  PA_UNROLL for (int a = 0; a < AHEAD; a++) {
    if (warp + a * WARPS < chunks) fetch(ahead[a], warp + a * WARPS);
  }
  if (!EXPERTS) PA_WAIT_FOR_BEFORE();  // only weights are read before, and nothing is written
  float acc[TILES][4];
  PA_UNROLL for (int i = 0; i < TILES * 4; i++) acc[i / 4][i % 4] = 0.0f;
  for (int from = warp; from < chunks; from += WARPS * AHEAD) {
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int at = from + a * WARPS, there = at * 4 + c, unit = there < units ? there : 0;
      if (at >= chunks) break;
      auto row_of = [&](int n, int e) {
        const int row = row0 + n * 8 + r, from_row = GATHER && row < M ? source[row] : row;
        if (row >= M || there >= units) return uint4{0, 0, 0, 0};
        return ((const uint4*)x)[(size_t)from_row * (K / 8) + Codes::eight(unit, e)];
      };
      uint4 rows[4];
      PA_UNROLL for (int e = 0; e < 4; e++) rows[e] = row_of(0, e);
      Scaled by[2][PARTS];
      PA_UNROLL for (int h = 0; h < 2; h++) {
        PA_UNROLL for (int part = 0; part < PARTS; part++) {
          by[h][part] = Scaled(Scales::scale(ahead[a].factor[h], ahead[a].bytes[h], part),
                               Scales::offset(ahead[a].least[h], ahead[a].bytes[h], part));
        }
      }
      PA_UNROLL for (int e = 0; e < 4; e++) {
        unsigned numbers[4][2];
        PA_UNROLL for (int i = 0; i < 4; i++) {
          PA_UNROLL for (int h = 0; h < 2; h++) {
            const unsigned two = Codes::pair(ahead[a].low[h], ahead[a].high[h], e * 4 + i);
            numbers[i][h] = by[h][e * 8 / GROUP].weights(TABLE ? values[two & 15u] | values[two >> 16] << 16 : two);
          }
        }
        const unsigned one[4] = {numbers[0][0], numbers[0][1], numbers[1][0], numbers[1][1]};
        const unsigned two[4] = {numbers[2][0], numbers[2][1], numbers[3][0], numbers[3][1]};
        PA_UNROLL for (int n = 0; n < TILES; n++) {
          const uint4 b = n == 0 ? rows[e] : row_of(n, e);
          pa_mma<T>(acc[n], one, b.x, b.y);
          pa_mma<T>(acc[n], two, b.z, b.w);
        }
      }
      if (at + WARPS * AHEAD < chunks) fetch(ahead[a], at + WARPS * AHEAD);
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
      PA_UNROLL for (int w = 0; w < WARPS; w++) y += sums[w * TILES * 128 + i] * Scaled::WHOLE;
      out[(size_t)row * N + output] = O(y);
    }
  }
