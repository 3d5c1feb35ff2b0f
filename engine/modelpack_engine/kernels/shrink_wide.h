  // Rows times the first matrices of their adapters, on tensor cores (CUDA only), for many rows. A block multiplies
  // 16 rows by the matrices of one adapter after the other: they are a prompt's mostly. Of the first rows, which are
  // those of single tokens, it multiplies one.
  //   x [rows, IN] T   down [slots, N, IN] T   slots [rows] int: 0 is no adapter
  //   singles [1 + rows of single tokens]: only its shape is read   out [rows, N] T, only of rows with an adapter
  PA_LET_NEXT_START();
  constexpr int ROWS = 16, WARPS = 16, TILES = N / 8, TOGETHER = TILES < 6 ? TILES : 6, COLUMNS = TOGETHER * 8;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, r = lane / 4, c = lane % 4, block = PA_X;
  const int rows = slots_shape[0], tokens = singles_shape[0] - 1;
  const int row0 = block < tokens ? block : tokens + (block - tokens) * ROWS;
  const int last = (block < tokens ? block + 1 : rows) - 1;
  PA_SHARED(float, products, WARPS * ROWS * COLUMNS);
  unsigned starts = 1u;  // bit i: another adapter than that of the row before
  PA_UNROLL for (int i = 1; i < ROWS; i++) {
    if (row0 + i <= last && slots[row0 + i] != slots[row0 + i - 1]) starts |= 1u << i;
  }
  const int lower = row0 + r < last ? row0 + r : last, upper = row0 + r + 8 < last ? row0 + r + 8 : last;
  for (int from = 0, to = 0; from < ROWS && row0 + from <= last; from = to) {
    for (to = from + 1; to < ROWS && !(starts >> to & 1u);) to++;
    const int slot = slots[row0 + from];
    if (slot <= 0) continue;
    // Each warp adds up a part of the inputs, of which a lane reads 8 consecutive ones and uses them in two steps.
    for (int tile = 0; tile < TILES; tile += TOGETHER) {
      float d[TOGETHER][4];
      PA_UNROLL for (int t = 0; t < TOGETHER; t++) d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0.0f;
      const T* by = down + ((size_t)slot * N + tile * 8 + r) * IN + c * 8;
      _Pragma("unroll 4") for (int k = warp * 32; k < IN; k += WARPS * 32) {
        const uint4 low = *(const uint4*)(x + (size_t)lower * IN + k + c * 8);
        const uint4 high = *(const uint4*)(x + (size_t)upper * IN + k + c * 8);
        const unsigned first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
        PA_UNROLL for (int t = 0; t < TOGETHER; t++) {
          if (tile + t < TILES) {
            const uint4 w = *(const uint4*)(by + (size_t)t * 8 * IN + k);
            pa_mma<T>(d[t], first, w.x, w.y);
            pa_mma<T>(d[t], second, w.z, w.w);
          }
        }
      }
      PA_UNROLL for (int t = 0; t < TOGETHER; t++) {
        PA_UNROLL for (int i = 0; i < 4; i++) {
          products[(warp * ROWS + r + i / 2 * 8) * COLUMNS + t * 8 + c * 2 + i % 2] = d[t][i];
        }
      }
      PA_SYNC();
      for (int at = thread; at < ROWS * COLUMNS; at += WARPS * 32) {
        const int row = at / COLUMNS, column = tile * 8 + at % COLUMNS;
        float sum = 0.0f;
        PA_UNROLL for (int w = 0; w < WARPS; w++) sum += products[w * ROWS * COLUMNS + at];
        if (column < N && row >= from && row < to && row0 + row <= last) out[(size_t)(row0 + row) * N + column] = T(sum);
      }
      PA_SYNC();
    }
  }
