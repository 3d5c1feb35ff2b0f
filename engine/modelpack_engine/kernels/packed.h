  // Matmuls with packed weights [N, K], affine quantised, on tensor cores; CUDA only. No weight is written
  // in its full type: a lane converts the codes that it multiplies in registers.
  //   x [M, K] T   weight [N, K * BITS / 32] uint, low bits first   scales, biases [N, K / GROUP] T
  //   bias [N] T (BIAS)   out [parts, M, N] O: several parts must be added
  //   SWIGLU: the first half of weights are gates, and out [1, M, N / 2] is silu(gate) * other half
  // A block computes WARPS * STRIPS * 16 outputs of MT rows over its part of K, in steps of DEPTH, with
  // STAGES steps' weights, scales and rows in shared memory or on their way there.
  // A warp multiplies codes, whose sums are scaled after each group, and the sums of rows are multiplied by biases;
  // sums may have any order, so a lane uses codes as they lie.
  constexpr int THREADS = WARPS * 32, OUTPUTS = WARPS * STRIPS * 16, TILES = MT / 8;
  constexpr int CHUNKS = DEPTH * BITS / 128, W_AT = MT * DEPTH * 2, STAGE = W_AT + OUTPUTS * CHUNKS * 16;
  constexpr int UNIT = GROUP < DEPTH ? GROUP : DEPTH;  // the depth that one scale of a step is for
  constexpr int AHEAD = STAGES - 1;
  // Scales and biases are copied for SPAN groups at a time, which are STEPS steps, to one of RING places.
  constexpr int STEPS = SPAN * GROUP / DEPTH, RING = AHEAD / STEPS + 2;
  typedef PaCodes<T, BITS> Codes;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  const int M = x_shape[0], N = weight_shape[0], K = weight_shape[1] * (32 / BITS);
  const int width = SWIGLU ? N / 2 : N, groups = K / GROUP;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4;
  const int part = blockIdx.z, steps = K / DEPTH / gridDim.z, start = part * steps;
  const int row0 = blockIdx.x * MT, first = blockIdx.y * (SWIGLU ? OUTPUTS / 2 : OUTPUTS);
  const int strip0 = warp * STRIPS * 16;  // this warp's first output of the block's
  // The column of `out` of the block's output i, and the row of weights that it is computed from: with
  // SWIGLU, eight gates and then their up rows, so that a lane has both.
  auto column = [&](int i) { return first + (SWIGLU ? i / 16 * 8 + i % 8 : i); };
  auto line = [&](int i) {
    const int at = column(i);
    return at >= width ? 0 : SWIGLU && i % 16 >= 8 ? at + width : at;
  };
  // Lines that are read together lie in different banks.
  auto turn = [](int i) { return i / (8 / CHUNKS) * (BITS / 4) % CHUNKS; };

  auto load = [&](int step) {
    unsigned char* stage = pa_memory + step % STAGES * STAGE;
    const int k = (start + step) * DEPTH;
    PA_UNROLL for (int j = 0; j < (OUTPUTS * CHUNKS + THREADS - 1) / THREADS; j++) {
      const int i = j * THREADS + threadIdx.x, output = i / CHUNKS, chunk = i % CHUNKS;
      if (OUTPUTS * CHUNKS % THREADS && i >= OUTPUTS * CHUNKS) break;
      pa_copy16_or_zero(stage + W_AT + (output * CHUNKS + (chunk ^ turn(output))) * 16,
                        (const unsigned char*)weight + ((size_t)line(output) * K + k) / 8 * BITS + chunk * 16,
                        column(output) < width);
    }
    PA_UNROLL for (int j = 0; j < (MT * DEPTH / 8 + THREADS - 1) / THREADS; j++) {
      const int i = j * THREADS + threadIdx.x, chunk = i % 8, row = i / 8 % MT, panel = i / 8 / MT;
      if (MT * DEPTH / 8 % THREADS && i >= MT * DEPTH / 8) break;
      const bool there = row0 + row < M;
      pa_copy16_or_zero(stage + ((panel * MT + row) * 8 + (chunk ^ row % 2 * 4)) * 16,
                        x + (size_t)(there ? row0 + row : 0) * K + k + panel * 64 + chunk * 8, there);
    }
    if (step == 0 || (start + step) % STEPS == 0) {
      const int span = (start + step) / STEPS;
      PA_UNROLL for (int j = 0; j < STRIPS; j++) {
        const int i = j * THREADS + threadIdx.x, output = i % OUTPUTS;
        pa_copy_or_zero<SPAN * 2>(pa_memory + STAGES * STAGE + (span % RING * OUTPUTS * 2 + i) * (SPAN * 2),
                                  (i / OUTPUTS ? biases : scales) + (size_t)line(output) * groups + span * SPAN,
                                  column(output) < width);
      }
    }
  };
  // The scales of a step, [2, OUTPUTS, SPAN]: then biases.
  auto scales_of = [&](int step) {
    const int span = (start + step) / STEPS;
    return (const T*)(pa_memory + STAGES * STAGE) + span % RING * OUTPUTS * 2 * SPAN
        + (start + step) * DEPTH / GROUP % SPAN;
  };

  float acc[STRIPS][TILES][4];
  PA_UNROLL for (int i = 0; i < STRIPS * TILES * 4; i++) acc[i / 4 / TILES][i / 4 % TILES][i % 4] = 0.0f;
  PA_UNROLL for (int step = 0; step < AHEAD; step++) {
    if (step < steps) load(step);
    pa_copies_commit();
  }
  auto arrive = [&](int step) {
    pa_copies_wait<AHEAD - 1>();
    __syncthreads();
    if (step + AHEAD < steps) load(step + AHEAD);
    pa_copies_commit();
    return pa_memory + step % STAGES * STAGE;
  };

  float sum[STRIPS][TILES][4], total[TILES][4];
  for (int step = 0; step < steps; step++) {
    const unsigned char* stage = arrive(step);
    const T* scaled = scales_of(step);
    PA_UNROLL for (int i = 0; i < DEPTH / 32; i++) {
      if (i * 32 % UNIT == 0) {
        PA_UNROLL for (int n = 0; n < TILES * 4; n++) {
          total[n / 4][n % 4] = 0.0f;
          PA_UNROLL for (int m = 0; m < STRIPS; m++) sum[m][n / 4][n % 4] = 0.0f;
        }
      }
      unsigned a[STRIPS][2][4];
      PA_UNROLL for (int m = 0; m < STRIPS * 2; m++) {
        const int output = strip0 + m * 8 + r;
        const unsigned char* codes = stage + W_AT + output * CHUNKS * 16;
        if (BITS == 4) {  // pairs (0 4) (1 5) (2 6) (3 7)
          const unsigned word = *(const unsigned*)(codes + (i ^ turn(output)) * 16 + c * 4);
          PA_UNROLL for (int e = 0; e < 4; e++) a[m / 2][m % 2][e] = Codes::nibbles(word >> e * 4);
        } else {
          const uint2 v = *(const uint2*)(codes + ((i * 2 + c / 2) ^ turn(output)) * 16 + c % 2 * 8);
          a[m / 2][m % 2][0] = Codes::bytes(v.x), a[m / 2][m % 2][1] = Codes::bytes(v.x >> 16);
          a[m / 2][m % 2][2] = Codes::bytes(v.y), a[m / 2][m % 2][3] = Codes::bytes(v.y >> 16);
        }
      }
      PA_UNROLL for (int n = 0; n < TILES; n++) {
        const int row = n * 8 + r;
        uint4 b = {0, 0, 0, 0};
        if (row0 + row < M) {
          b = *(const uint4*)(stage + ((i / 2 * MT + row) * 8 + ((i % 2 * 4 + c) ^ row % 2 * 4)) * 16);
        }
        if (BITS == 4) {
          const uint4 v = b;
          b.x = __byte_perm(v.x, v.z, 0x5410), b.y = __byte_perm(v.x, v.z, 0x7632);
          b.z = __byte_perm(v.y, v.w, 0x5410), b.w = __byte_perm(v.y, v.w, 0x7632);
        }
        const unsigned ones[4] = {Codes::ONES, Codes::ONES, Codes::ONES, Codes::ONES};
        pa_mma<T>(total[n], ones, b.x, b.y);
        pa_mma<T>(total[n], ones, b.z, b.w);
        PA_UNROLL for (int m = 0; m < STRIPS; m++) {
          const unsigned one[4] = {a[m][0][0], a[m][1][0], a[m][0][1], a[m][1][1]};
          const unsigned two[4] = {a[m][0][2], a[m][1][2], a[m][0][3], a[m][1][3]};
          pa_mma<T>(sum[m][n], one, b.x, b.y);
          pa_mma<T>(sum[m][n], two, b.z, b.w);
        }
      }
      if ((i + 1) * 32 % UNIT == 0) {
        PA_UNROLL for (int m = 0; m < STRIPS * 2; m++) {
          const int output = strip0 + m * 8 + r;
          const float scale = float(scaled[output * SPAN + i * 32 / UNIT]);
          const float offset = float(scaled[(OUTPUTS + output) * SPAN + i * 32 / UNIT]) - Codes::OFFSET * scale;
          PA_UNROLL for (int n = 0; n < TILES * 2; n++) {
            const int at = m % 2 * 2 + n % 2;
            acc[m / 2][n / 2][at] += scale * sum[m / 2][n / 2][at] + offset * total[n / 2][n % 2];
          }
        }
      }
    }
  }

  PA_UNROLL for (int x = 0; x < STRIPS * TILES * 4; x++) {
    const int m = x / 4 / TILES, n = x / 4 % TILES, i = x % 4;
    if (SWIGLU && i >= 2) continue;
    const int output = strip0 + m * 16 + i / 2 * 8 + r, row = n * 8 + c * 2 + i % 2;
    const int at = column(output);
    if (row0 + row < M && at < width) {
      float value = acc[m][n][i];
      if (BIAS && part == 0) value += float(bias[at]);
      if (SWIGLU) {
        float up = acc[m][n][i + 2];
        if (BIAS) up += float(bias[at + width]);
        value = float(T(value));
        value = float(T(value / (1.0f + PA_EXP2(-1.44269504f * value)))) * float(T(up));
      }
      out[((size_t)part * M + row0 + row) * width + at] = O(value);
    }
  }
