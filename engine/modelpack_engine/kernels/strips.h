  // Matmuls of up to 8 rows with packed weights of N outputs and K inputs, on tensor cores; CUDA only. The text before
  // this one, packed_strips.h or block_strips.h, reads the weights.
  //   x [M, K] T (M at most ROWS)   bias [N] T (BIAS)
  //   out [parts, M, N] O: several parts must be added; each is of D inputs
  //   SWIGLU: the first half of weights are gates, and out [M, N / 2] is silu(gate) * other half
  //   NORMED: one row x, the RMS norm of total = x + the sum of more [PARTS, K] B, times norm [K] V (see
  //   add_norm.h), where EPSILON is a float's bits, and there is one part
  // A block computes strips of 16 outputs (SWIGLU: 8 gates and their up rows), one of every STRIDE. The last
  // COPYING warps copy the weights to STAGES places of shared memory, as far ahead as there is room, also
  // while the rows are normed and, if the kernel is launched early, while the one before still runs. A stage has
  // up to WARPS units of inputs of a strip, each of which one of the other warps multiplies.
  // The text before has:
  //   UNIT, VECTORS: the inputs of a unit, and the vectors of eight that each of four lanes reads of a row of it
  //   STAGE: the bytes of a stage   line_bytes(k, units): those that are copied of a line, from input k on
  //   copy_piece(stage, line, piece, row, k, units, barrier): copies one of four pieces of them, or none
  //   vector_of, lane_of (eight): where eight inputs of a row are   arranged(eight): what is there
  //   multiply_unit(stage, unit, rows_of, sum_of, acc): adds the products of 16 outputs and 8 rows, divided by
  //   FACTOR, to acc, which is as pa_mma's; if SUMMED, it takes sums of GROUPS groups of a unit's inputs
  //   lane, warp, r = lane / 4, c = lane % 4
  constexpr int COPYING = 2, LINES = 16 / COPYING, THREADS = WARPS * 32;
  constexpr int UNITS = D / UNIT, SPLIT = (UNITS + WARPS - 1) / WARPS;  // units and stages of a strip
  constexpr bool KEPT = SPLIT == 1;                         // a warp multiplies the same inputs always
  constexpr int COLUMNS = ROWS == 1 ? 1 : 2;                // the rows that a lane has sums of
  typedef PaVec<T, 8> Eight;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  uint4* given = (uint4*)(pa_memory + STAGES * STAGE);      // the rows, in the order in which lanes read them
  float* whole = (float*)(given + D / 8 * ROWS);            // sums of their groups
  float* sums = whole + SUMMED * (D / GROUP * ROWS);        // [2, WARPS, ROWS, 16]
  float* partial = sums + 2 * WARPS * ROWS * 16;
  PaBarrier* full = (PaBarrier*)(partial + 16);
  PaBarrier* empty = full + STAGES;
  const int N = weight_shape[0], K = D * PA_DEPTH, M = ROWS == 1 ? 1 : x_shape[0];
  const int width = SWIGLU ? N / 2 : N, strips = (width + (SWIGLU ? 7 : 15)) / (SWIGLU ? 8 : 16);
  const int index = warp * 32 + lane;
  const int items = (strips - PA_X + STRIDE - 1) / STRIDE * SPLIT;
  if (index == 0) {
    for (int s = 0; s < STAGES; s++) {
      pa_barrier_make(full + s, COPYING);
      pa_barrier_make(empty + s, WARPS);
    }
    pa_barriers_made();
  }
  PA_SYNC();
  PA_LET_NEXT_START();

  if (warp >= WARPS) {
    const int i = (warp - WARPS) * LINES + lane % LINES;
    for (int item = 0; item < items; item++) {
      const int strip = PA_X + item / SPLIT * STRIDE, s = item % STAGES, first = item % SPLIT * WARPS;
      const int units = UNITS - first < WARPS ? UNITS - first : WARPS, k = PA_Z * D + first * UNIT;
      unsigned char* stage = pa_memory + s * STAGE;
      if (item >= STAGES) pa_barrier_wait(empty + s, (item / STAGES - 1) & 1);
      if (lane == 0) pa_barrier_expect(full + s, LINES * line_bytes(k, units));
      pa_sync_warp();
      const int at = SWIGLU ? strip * 8 + i % 8 : strip * 16 + i;
      const size_t row = at >= width ? 0 : SWIGLU && i >= 8 ? at + width : at;  // any if there is none
      copy_piece(stage, i, lane / LINES, row, k, units, full + s);
    }
    return;
  }

  PA_WAIT_FOR_BEFORE();  // only weights are read before, and nothing is written
  auto keep = [&](int row, int at, Eight values, bool there) {
    float sum = 0.0f;
    if (there) {
      PA_UNROLL for (int e = 0; SUMMED && e < 8; e++) sum += float(values.e[e]);
      given[(vector_of(at) * ROWS + row) * 4 + lane_of(at)] = arranged(*(const uint4*)&values);
    }
    PA_UNROLL for (int mask = GROUP / 16; SUMMED && mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    if (SUMMED && there && at % (GROUP / 8) == 0) whole[at / (GROUP / 8) * ROWS + row] = sum;
  };
  if constexpr (NORMED) {
    constexpr int MOST = (D / 8 + THREADS - 1) / THREADS;
    typedef PaVec<B, 8> Parts;
    typedef PaVec<V, 8> Norm;
    Eight kept[MOST];
    Norm wide[MOST];
    float squares = 0.0f;
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index;
      if (at < D / 8) {
        kept[i] = ((const PA_DEVICE Eight*)x)[at];
        wide[i] = ((const PA_DEVICE Norm*)norm)[at];
        float added[8];
        PA_UNROLL for (int e = 0; e < 8; e++) added[e] = 0.0f;
        PA_UNROLL for (int part = 0; part < PARTS; part++) {
          const Parts y = ((const PA_DEVICE Parts*)more)[part * (D / 8) + at];
          PA_UNROLL for (int e = 0; e < 8; e++) added[e] += float(y.e[e]);
        }
        PA_UNROLL for (int e = 0; e < 8; e++) {
          kept[i].e[e] = T(float(kept[i].e[e]) + float(T(added[e])));
          squares += float(kept[i].e[e]) * float(kept[i].e[e]);
        }
        if (PA_X == 0) ((PA_DEVICE Eight*)total)[at] = kept[i];
      }
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
    if (lane == 0) partial[warp] = squares;
    pa_sync_first<THREADS>();
    squares = 0.0f;
    PA_UNROLL for (int w = 0; w < WARPS; w++) squares += partial[w];
    const float scaled = PA_RSQRT(squares / D + pa_float(EPSILON));
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index;
      if (at < D / 8) {
        PA_UNROLL for (int e = 0; e < 8; e++) {
          kept[i].e[e] = T(float(kept[i].e[e]) * scaled * float(wide[i].e[e]));
        }
      }
      keep(0, at, kept[i], at < D / 8);
    }
  } else {
    constexpr int COUNT = D / 8 * ROWS, MOST = (COUNT + THREADS - 1) / THREADS;
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index, row = at / (D / 8), part = at % (D / 8);
      Eight values;
      PA_UNROLL for (int e = 0; e < 8; e++) values.e[e] = T(0.0f);
      if (at < COUNT && row < M) values = ((const PA_DEVICE Eight*)(x + (size_t)row * K + PA_Z * D))[part];
      keep(row, part, values, at < COUNT);
    }
  }
  pa_sync_first<THREADS>();

  auto rows_of = [&](int vector) { return given[(vector * ROWS + r % ROWS) * 4 + c]; };
  auto sum_of = [&](int group, int h) { return whole[group * ROWS + (ROWS == 1 ? 0 : (c * 2 + h) % ROWS)]; };
  constexpr bool KEPT_SUMS = SUMMED && KEPT && GROUPS <= 4;  // more would take too many registers
  uint4 own_rows[KEPT ? VECTORS : 1];
  float own_sums[KEPT_SUMS ? GROUPS : 1][COLUMNS];
  if constexpr (KEPT) {
    PA_UNROLL for (int v = 0; v < VECTORS; v++) own_rows[v] = rows_of(warp * VECTORS + v);
    PA_UNROLL for (int i = 0; KEPT_SUMS && i < GROUPS * COLUMNS; i++) {
      own_sums[KEPT_SUMS ? i / COLUMNS : 0][i % COLUMNS] = sum_of(warp * GROUPS + i / COLUMNS, i % COLUMNS);
    }
  }
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int item = 0; item < items; item++) {
    const int s = item % STAGES, unit = item % SPLIT * WARPS + warp;
    const unsigned char* stage = pa_memory + s * STAGE;
    pa_barrier_wait(full + s, item / STAGES & 1);
    if (UNITS % WARPS == 0 || unit < UNITS) {
      multiply_unit(
          stage, PA_Z * D / UNIT + unit,
          [&](int v) { return KEPT ? own_rows[KEPT ? v : 0] : rows_of(unit * VECTORS + v); },
          [&](int g, int h) { return KEPT_SUMS ? own_sums[KEPT_SUMS ? g : 0][h] : sum_of(unit * GROUPS + g, h); }, acc);
    }
    pa_sync_warp();
    if (lane == 0) pa_barrier_arrive(empty + s);
    if (item % SPLIT != SPLIT - 1) continue;

    const int strip = PA_X + item / SPLIT * STRIDE;
    float* own = sums + item / SPLIT % 2 * (WARPS * ROWS * 16);
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int row = c * 2 + i % 2;
      if (row < ROWS) own[(warp * ROWS + row) * 16 + i / 2 * 8 + r] = acc[i];
      acc[i] = 0.0f;
    }
    pa_sync_first<THREADS>();
    constexpr int OUTPUTS = SWIGLU ? 8 : 16;
    for (int i = index; i < OUTPUTS * ROWS; i += THREADS) {
      const int row = i / OUTPUTS, o = i % OUTPUTS, at = strip * OUTPUTS + o;
      if (at < width && row < M) {
        float value = 0.0f, up = 0.0f;
        PA_UNROLL for (int w = 0; w < WARPS; w++) {
          value += own[(w * ROWS + row) * 16 + o];
          if (SWIGLU) up += own[(w * ROWS + row) * 16 + o + 8];
        }
        value *= FACTOR, up *= FACTOR;
        if (BIAS && PA_Z == 0) {
          value += float(bias[at]);
          if (SWIGLU) up += float(bias[at + width]);
        }
        if (SWIGLU) {
          value = float(T(value));
          value = float(T(value / (1.0f + PA_EXP2(-1.44269504f * value)))) * float(T(up));
        }
        out[((size_t)PA_Z * M + row) * width + at] = O(value);
      }
    }
  }
