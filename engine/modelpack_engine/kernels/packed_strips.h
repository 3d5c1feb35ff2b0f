  // Matmuls of up to 8 rows with packed weights [N, K] of 4 or 8 BITS, affine quantised, on tensor cores; CUDA
  // only. Weights are multiplied as codes; sums of a group are scaled.
  //   x [M, K] T (M at most ROWS)   weight [N, K * BITS / 32] uint, low bits first
  //   scales, biases [N, K / GROUP] T
  //   bias [N] T (BIAS)   out [parts, M, N] O: several parts must be added; each is of D inputs
  //   SWIGLU: the first half of weights are gates, and out [M, N / 2] is silu(gate) * other half
  //   NORMED: one row x, the RMS norm of total = x + the sum of more [PARTS, K] B, times norm [K] V (see
  //   add_norm.h), where EPSILON is a float's bits, and there is one part
  // A block computes strips of 16 outputs (SWIGLU: 8 gates and their up rows), one of every STRIDE. The last
  // COPYING warps have the weights copied to STAGES places of shared memory, as far ahead as there is room,
  // also while the rows are normed and, if the kernel is launched early, while the one before still runs. A stage
  // has up to WARPS units of 256 inputs of a strip, each of which one of the other warps multiplies.
  constexpr int UNIT = 256, COPYING = 2, LINES = 16 / COPYING, THREADS = WARPS * 32;
  constexpr int GROUPS = UNIT / GROUP, AT_A_TIME = GROUPS < 4 ? GROUPS : 4;  // groups of a unit
  constexpr int BYTES = UNIT * BITS / 8, PART = GROUP * BITS / 8;       // of a unit and of a group
  constexpr int PIECE = PART / 4, WORDS = PIECE / 4;        // bytes and words that a lane reads of a group
  constexpr int EIGHTS = GROUP / 8, RUN = EIGHTS / 4;       // eights of inputs of a group, and of a lane
  constexpr int UNITS = D / UNIT, SPLIT = (UNITS + WARPS - 1) / WARPS;  // units and stages of a strip
  // Lines of a stage are as far apart as lets eight of them be read at the same time.
  constexpr int PITCH = WARPS * BYTES + (PART < 128 ? PART : 16), SCALES = WARPS * GROUPS * 2;
  constexpr int SCALE_PITCH = SCALES / 16 % 2 ? SCALES : SCALES + 16;
  constexpr int STAGE = 16 * PITCH + 32 * SCALE_PITCH;
  constexpr bool KEPT = SPLIT == 1;                         // a warp multiplies the same inputs always
  constexpr int COLUMNS = ROWS == 1 ? 1 : 2;                // the rows that a lane has sums of
  typedef PaPairs<T, BITS> Pairs;
  typedef PaVec<T, 8> Eight;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  unsigned char* given = pa_memory + STAGES * STAGE;        // the rows, in the order in which lanes read them
  float* whole = (float*)(given + D * ROWS * 2);            // sums of their groups
  float* sums = whole + D / GROUP * ROWS;                   // [2, WARPS, ROWS, 16]
  float* partial = sums + 2 * WARPS * ROWS * 16;
  PaBarrier* full = (PaBarrier*)(partial + 16);
  PaBarrier* empty = full + STAGES;
  const int N = weight_shape[0], K = weight_shape[1] * (32 / BITS), M = ROWS == 1 ? 1 : x_shape[0];
  const int width = SWIGLU ? N / 2 : N, strips = (width + (SWIGLU ? 7 : 15)) / (SWIGLU ? 8 : 16);
  const int lane = PA_LANE, warp = PA_SIMD, index = warp * 32 + lane, r = lane / 4, c = lane % 4;
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
      if (lane == 0) pa_barrier_expect(full + s, LINES * units * (BYTES + 4 * GROUPS));
      pa_sync_warp();
      const int at = SWIGLU ? strip * 8 + i % 8 : strip * 16 + i;
      const size_t row = at >= width ? 0 : SWIGLU && i >= 8 ? at + width : at;  // any if there is none
      if (lane < LINES) {
        pa_bulk_copy(stage + i * PITCH, (const unsigned char*)weight + (row * K + k) * BITS / 8, units * BYTES, full + s);
      } else if (lane < 3 * LINES) {
        const bool offsets = lane >= 2 * LINES;
        pa_bulk_copy(stage + 16 * PITCH + (offsets * 16 + i) * SCALE_PITCH,
                     (offsets ? biases : scales) + row * (K / GROUP) + k / GROUP, units * GROUPS * 2, full + s);
      }
    }
    return;
  }

  PA_WAIT_FOR_BEFORE();  // only weights are read before, and nothing is written
  // Eight values of a row, in the pairs in which codes are.
  auto place = [&](int group, int eight, int row, int by) {
    return (uint4*)given + ((group * RUN + eight) * ROWS + row) * 4 + by;
  };
  auto keep = [&](int row, int at, Eight values, bool there) {
    float sum = 0.0f;
    if (there) {
      PA_UNROLL for (int e = 0; e < 8; e++) sum += float(values.e[e]);
      const uint4 v = *(const uint4*)&values;
      const unsigned one = BITS == 8 ? v.y : v.z, two = BITS == 8 ? v.z : v.y;
      *place(at / EIGHTS, at % RUN, row, at % EIGHTS / RUN) =
          Pairs::rows({__byte_perm(v.x, one, 0x5410), __byte_perm(v.x, one, 0x7632),
                       __byte_perm(two, v.w, 0x5410), __byte_perm(two, v.w, 0x7632)});
    }
    PA_UNROLL for (int mask = GROUP / 16; mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    if (there && at % EIGHTS == 0) whole[at / EIGHTS * ROWS + row] = sum;
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

  auto rows_of = [&](int group, int eight) { return *place(group, eight, r % ROWS, c); };
  auto sum_of = [&](int group, int h) { return whole[group * ROWS + (ROWS == 1 ? 0 : (c * 2 + h) % ROWS)]; };
  constexpr bool KEPT_SUMS = KEPT && GROUPS <= 4;  // more would take too many registers
  uint4 own_rows[KEPT ? GROUPS : 1][RUN];
  float own_sums[KEPT_SUMS ? GROUPS : 1][COLUMNS];
  if constexpr (KEPT) {
    PA_UNROLL for (int g = 0; g < GROUPS; g++) {
      PA_UNROLL for (int e = 0; e < RUN; e++) own_rows[g][e] = rows_of(warp * GROUPS + g, e);
      PA_UNROLL for (int h = 0; h < COLUMNS; h++) {
        if (KEPT_SUMS) own_sums[KEPT_SUMS ? g : 0][h] = sum_of(warp * GROUPS + g, h);
      }
    }
  }
  float acc[2][COLUMNS];
  PA_UNROLL for (int i = 0; i < 2 * COLUMNS; i++) acc[i / COLUMNS][i % COLUMNS] = 0.0f;
  for (int item = 0; item < items; item++) {
    const int s = item % STAGES, unit = item % SPLIT * WARPS + warp;
    const unsigned char* stage = pa_memory + s * STAGE;
    pa_barrier_wait(full + s, item / STAGES & 1);
    if (UNITS % WARPS == 0 || unit < UNITS) {
      // Scales and offsets of AT_A_TIME groups: all eight of groups of 32 would take too many registers.
      PaVec<T, AT_A_TIME> by[2][2];
      PA_UNROLL for (int g = 0; g < GROUPS; g++) {
        PA_UNROLL for (int i = 0; g % AT_A_TIME == 0 && i < 4; i++) {
          by[i / 2][i % 2] = *(const PaVec<T, AT_A_TIME>*)(stage + 16 * PITCH
              + (i % 2 * 16 + i / 2 * 8 + r) * SCALE_PITCH + (warp * GROUPS + g) * 2);
        }
        PaVec<unsigned, WORDS> codes[2];
        PA_UNROLL for (int high = 0; high < 2; high++) {
          codes[high] = *(const PaVec<unsigned, WORDS>*)(stage + (high * 8 + r) * PITCH + warp * BYTES
              + g * PART + c * PIECE);
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        PA_UNROLL for (int e = 0; e < RUN; e++) {
          const uint4 b = KEPT ? own_rows[KEPT ? g : 0][e] : rows_of(unit * GROUPS + g, e);
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
          const float scale = float(by[high][0].e[g % AT_A_TIME]);
          const float offset = float(by[high][1].e[g % AT_A_TIME]) - Pairs::OFFSET * scale;
          PA_UNROLL for (int h = 0; h < COLUMNS; h++) {
            const float all = KEPT_SUMS ? own_sums[KEPT_SUMS ? g : 0][h] : sum_of(unit * GROUPS + g, h);
            acc[high][h] += scale * Pairs::WHOLE * sum[high * 2 + h] + offset * all;
          }
        }
      }
    }
    pa_sync_warp();
    if (lane == 0) pa_barrier_arrive(empty + s);
    if (item % SPLIT != SPLIT - 1) continue;

    const int strip = PA_X + item / SPLIT * STRIDE;
    float* own = sums + item / SPLIT % 2 * (WARPS * ROWS * 16);
    PA_UNROLL for (int i = 0; i < 2 * COLUMNS; i++) {
      const int high = i / COLUMNS, h = i % COLUMNS, row = c * 2 + h;
      if (row < ROWS) own[(warp * ROWS + row) * 16 + high * 8 + r] = acc[high][h];
      acc[high][h] = 0.0f;
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
