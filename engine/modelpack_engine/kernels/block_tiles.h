  // Matmuls with weights in block types (blocks.h) on tensor cores; CUDA only. Weights go from memory to
  // registers, where they become numbers of the type T.
  //   x [M, K] T   weight [N, words of a row] uint   bias [N] T (BIAS)   out [M, N] O
  // EXPERTS: rows are sorted by expert, and a block has those of a span: its expert, first row and number of rows.
  // With GATHER, row i is source[i] of x.
  //   weight [experts, N, words]   bias [experts, N]   spans [blocks, 3]   source [rows]   out [rows, N]
  // A block computes 16 outputs of TILES * 8 rows; its WARPS share the inputs, in chunks (block_chunk.h, the text before).
  const int K = x_shape[1], N = weight_shape[EXPERTS ? 1 : 0], words = weight_shape[EXPERTS ? 2 : 1], units = K / 32;
  const int lane = PA_LANE, warp = PA_SIMD, r = lane / 4, c = lane % 4, chunks = (units + 3) / 4;
  PA_LET_NEXT_START();
  if (EXPERTS) PA_WAIT_FOR_BEFORE();
  const int output0 = PA_X * 16, row0 = EXPERTS ? spans[PA_Y * 3 + 1] : PA_Y * (TILES * 8);
  const int M = EXPERTS ? row0 + spans[PA_Y * 3 + 2] : x_shape[0];
  if (row0 >= M) return;  // a span that is not used
  const size_t of_expert = EXPERTS ? (size_t)spans[PA_Y * 3] * N : 0;
  const int highs = K / 32 * LOW, scales_at = highs + K / 32 * HIGH;
  if (TABLE) PA_SYNC();
  Chunk ahead[AHEAD];
  const unsigned* lines[2];
  PA_UNROLL for (int h = 0; h < 2; h++) {
    const int output = output0 + h * 8 + r;
    lines[h] = weight + (of_expert + (output < N ? output : N - 1)) * words;
  }
  auto fetch = [&](Chunk& chunk, int at) {
    const unsigned unit = at * 4 + c < units ? at * 4 + c : 0;
    PA_UNROLL for (int h = 0; h < 2; h++) {
      read_line(chunk, h, lines[h] + unit * LOW, lines[h] + highs + unit * HIGH, lines[h] + scales_at, unit);
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
      multiply_chunk(ahead[a], row_of, acc);
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
