  // Matmuls of up to 8 rows with packed weights of N outputs and K inputs, on tensor cores; CUDA only. The texts before
  // this one are for a format of weights (packed_strips.h, block_strips.h, digit_strips.h) and for rows (float_rows.h,
  // digit_rows.h), after what they have in common (units.h).
  //   x [M, K] T (M at most ROWS)   bias [N] T (BIAS)
  //   out [parts, M, N] O: several parts must be added; each is of D inputs
  //   SWIGLU: the first half of weights are gates, and out [M, N / 2] is silu(gate) * other half
  //   NORMED: one row x, the RMS norm of total = x + the sum of more [PARTS, K] B, times norm [K] V (see
  //   add_norm.h), where EPSILON is a float's bits, and there is one part
  // A block computes strips of 16 outputs (SWIGLU: 8 gates and their up rows), one of every STRIDE. Beside its WARPS,
  // COPYING warps copy the weights to STAGES places of shared memory, as far ahead as there is room, also while the rows
  // are normed and, if the kernel is launched early, while the one before still runs. A stage has up to WARPS units of
  // inputs of a strip, each of which a warp multiplies. One more warp adds up their sums, so that they need not wait.
  // They have, of weights:
  //   FACTOR: of all sums
  //   STAGE: the bytes of a stage   line_bytes(k, units): those that are copied of a line, from input k on
  //   copy_piece(stage, line, piece, row, k, units, barrier): copies one of four pieces of them, or none
  //   multiply_unit(stage, unit, rows_of, sum_of, acc): adds the products of 16 outputs and all rows to acc
  // and of rows:
  //   ROWS_BYTES: of shared memory, after the stages
  //   keep(row, at, values, there): keeps eight inputs there, if any, for all warps
  //   Own, recall(own, unit): those of a unit, in registers   DIRECT: read(own, unit, rows, apart, M) reads them instead
  //   rows_of(own, unit, v), sum_of(own, unit, ...): what multiply_unit asks for
  //   SUMS, finish(acc, sums): writes a warp's sums [ROWS, 16], and makes acc zero
  constexpr int COPYING = 2, LINES = 16 / COPYING, THREADS = WARPS * 32;
  constexpr int SPLIT = (UNITS + WARPS - 1) / WARPS, OUTPUTS = SWIGLU ? 8 : 16;  // stages and outputs of a strip
  constexpr int OF_STRIP = OUTPUTS * ROWS, SHARES = OF_STRIP < 32 ? 32 / OF_STRIP : 1;  // lanes that add up an output
  float* sums = (float*)(pa_memory + STAGES * STAGE + ROWS_BYTES);  // [2, WARPS, ROWS, 16]
  float* partial = sums + 2 * WARPS * ROWS * 16;
  PaBarrier* full = (PaBarrier*)(partial + 16);
  PaBarrier* empty = full + STAGES;
  PaBarrier* written = empty + STAGES;  // sums of a strip, and where they can be written
  PaBarrier* added = written + 2;
  const int N = weight_shape[0], K = D * PA_DEPTH, M = ROWS == 1 ? 1 : x_shape[0];
  const int width = SWIGLU ? N / 2 : N, strips = (width + (SWIGLU ? 7 : 15)) / (SWIGLU ? 8 : 16);
  const int index = warp * 32 + lane;
  const int items = (strips - PA_X + STRIDE - 1) / STRIDE * SPLIT;
  if (index == 0) {
    for (int s = 0; s < STAGES; s++) {
      pa_barrier_make(full + s, COPYING);
      pa_barrier_make(empty + s, WARPS);
    }
    for (int s = 0; s < 2; s++) {
      pa_barrier_make(written + s, WARPS);
      pa_barrier_make(added + s, 1);
    }
    pa_barriers_made();
  }
  PA_SYNC();
  PA_LET_NEXT_START();

  if (warp >= WARPS && warp < WARPS + COPYING) {
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
  if (warp >= WARPS) {
    for (int turn = 0; PA_X + turn * STRIDE < strips; turn++) {
      const float* of_strip = sums + turn % 2 * (WARPS * ROWS * 16);
      pa_barrier_wait(written + turn % 2, turn / 2 & 1);
      PA_UNROLL for (int i = lane % OF_STRIP; i < OF_STRIP; i += 32) {
        const int row = i / OUTPUTS, o = i % OUTPUTS, at = (PA_X + turn * STRIDE) * OUTPUTS + o;
        float value = 0.0f, up = 0.0f;
        PA_UNROLL for (int w = 0; w < WARPS; w += SHARES) {
          const int from = w + lane / OF_STRIP;
          if (WARPS % SHARES == 0 || from < WARPS) {
            value += of_strip[(from * ROWS + row) * 16 + o];
            if (SWIGLU) up += of_strip[(from * ROWS + row) * 16 + o + 8];
          }
        }
        PA_UNROLL for (int mask = OF_STRIP; mask < 32; mask *= 2) {
          value += PA_XOR(value, mask);
          if (SWIGLU) up += PA_XOR(up, mask);
        }
        if (at >= width || row >= M || lane >= OF_STRIP) continue;
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
      pa_sync_warp();
      if (lane == 0) pa_barrier_arrive(added + turn % 2);
    }
    return;
  }

  // Only weights are read before, and nothing is written: the warp that adds does so when all others have waited.
  PA_WAIT_FOR_BEFORE();
  Own own;
  if constexpr (DIRECT) {
    read(own, warp, x + PA_Z * D, K, M);
  } else if constexpr (NORMED) {
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
  if (!DIRECT) pa_sync_first<THREADS>();

  if (KEPT) recall(own, warp);
  float acc[SUMS] = {};
  for (int item = 0; item < items; item++) {
    const int s = item % STAGES, unit = item % SPLIT * WARPS + warp;
    const unsigned char* stage = pa_memory + s * STAGE;
    pa_barrier_wait(full + s, item / STAGES & 1);
    if (UNITS % WARPS == 0 || unit < UNITS) {
      if (!KEPT) recall(own, unit);
      multiply_unit(
          own, stage, PA_Z * D / UNIT + unit, [&](int v) { return rows_of(own, unit, v); },
          [&](auto... at) { return sum_of(own, unit, at...); }, acc);
    }
    pa_sync_warp();
    if (lane == 0) pa_barrier_arrive(empty + s);
    if (item % SPLIT != SPLIT - 1) continue;

    const int turn = item / SPLIT;
    if (turn >= 2) pa_barrier_wait(added + turn % 2, (turn / 2 - 1) & 1);
    finish(acc, sums + (turn % 2 * WARPS + warp) * ROWS * 16);
    pa_sync_warp();
    if (lane == 0) pa_barrier_arrive(written + turn % 2);
  }
