  // Matmuls of few rows with weights [N, K], plain or quantised, on tensor cores; CUDA only. Reading the
  // weights takes most of the time: a block computes 64 outputs of all rows over its part of K, in tiles
  // of depth 64, with STAGES tiles in flight. Sums over K may have any order, so a lane reads 8
  // consecutive elements and uses them in two steps of the matmul.
  //   x [M, ...] T, K elements a row   weight [N, K] T, or packed in uint   scales, biases [N, K / GROUP] T (quantised)
  //   bias [N] T (BIAS)   out [parts, M, N] O: several parts must be added
  //   SWIGLU: the first half of weights are gates, and out [1, M, N / 2] is silu(gate) * other half
  // With PA_EXPERTS (experts.h), a block's rows and weights are those of one expert.
  PA_LET_NEXT_START();
#ifndef PA_EXPERTS
  const int rows = x_shape[0], N = weight_shape[0], packed = weight_shape[1], width = SWIGLU ? N / 2 : N;
  const size_t first_line = 0, first_row = 0;
#define PA_SOURCE(row) (row)
#define PA_OF(name, i) name
#define PA_LINE(i) (SWIGLU ? first + (i) % 32 + (i) / 32 * (N / 2) : first + (i))
#endif
  constexpr int OUTPUTS = 64, DEPTH = 64, THREADS = 128, CHUNKS = DEPTH * BITS / 128;
  constexpr int ACROSS = MT > 32 ? 2 : 1, DOWN = 4 / ACROSS;  // warps over rows, and over outputs
  constexpr int TILES = MT / ACROSS / 8, STRIPS = OUTPUTS / DOWN / 16;
  constexpr int W_BYTES = OUTPUTS * DEPTH * BITS / 8, STAGE = W_BYTES + MT * DEPTH * 2;
  constexpr int W_COPIES = OUTPUTS * CHUNKS / THREADS, X_COPIES = MT * 8 / THREADS;
  extern __shared__ __align__(128) unsigned char pa_memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int r = lane / 4, c = lane % 4, K = BITS == 16 ? packed : packed * (32 / (BITS % 16));
  const int part = blockIdx.z, steps = K / DEPTH / gridDim.z, start = part * steps, groups = K / GROUP;
  const int feature = warp % DOWN * (STRIPS * 16) + r, row0 = warp / DOWN * (TILES * 8);
  // Row of the weights that is this block's output i; with SWIGLU 32 gates, then their up rows.
  const int first = blockIdx.x * (SWIGLU ? OUTPUTS / 2 : OUTPUTS);
  auto place = [&](int i) { return PA_LINE(i); };
  auto exists = [&](int i) { return first + (SWIGLU ? i % 32 : i) < width; };

  // Rows of a tile that a quarter of a warp reads together lie in different banks.
  auto turn = [](int row) { return BITS == 16 ? row % 2 * 4 : BITS == 8 ? row / 2 % 2 * 2 : row / 4 % 2; };
  // What this thread copies: from where at depth 0, to where in a stage, and whether it exists.
  const unsigned char* w_from[W_COPIES];
  const T* x_from[X_COPIES];
  int w_to[W_COPIES], x_to[X_COPIES];
  bool w_there[W_COPIES], x_there[X_COPIES];
  PA_UNROLL for (int j = 0; j < W_COPIES; j++) {
    const int i = j * THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
    w_there[j] = exists(row);
    w_from[j] = (const unsigned char*)PA_OF(weight, row)
        + (first_line + (w_there[j] ? place(row) : 0)) * ((size_t)K * BITS / 8) + chunk * 16;
    w_to[j] = (row * CHUNKS + (chunk ^ turn(row))) * 16;
  }
  PA_UNROLL for (int j = 0; j < X_COPIES; j++) {
    const int i = j * THREADS + threadIdx.x, row = i / 8, chunk = i % 8;
    x_there[j] = row < rows;
    x_from[j] = x + (size_t)(x_there[j] ? PA_SOURCE(first_row + row) : 0) * K + chunk * 8;
    x_to[j] = W_BYTES + (row * 8 + (chunk ^ row % 2 * 4)) * 16;
  }
  auto load = [&](int step) {
    unsigned char* stage = pa_memory + step % STAGES * STAGE;
    const int k = (start + step) * DEPTH;
    PA_UNROLL for (int j = 0; j < W_COPIES; j++) {
      pa_copy16_or_zero(stage + w_to[j], w_from[j] + k * BITS / 8, w_there[j]);
    }
    PA_UNROLL for (int j = 0; j < X_COPIES; j++) {
      pa_copy16_or_zero(stage + x_to[j], x_from[j] + k, x_there[j]);
    }
  };
  // Scales and biases of this lane's outputs, for either half of a tile's depth.
  float scale[2 * STRIPS][2], offset[2 * STRIPS][2];
  auto load_scales = [&](int step) {
    PA_UNROLL for (int h = 0; h < 2 * STRIPS; h++) {
      PA_UNROLL for (int half = 0; half < 2; half++) {
        const int output = feature + h * 8;
        const size_t at = (first_line + (exists(output) ? place(output) : 0)) * groups
            + ((start + step) * DEPTH + half * 32) / GROUP;
        scale[h][half] = float(PA_OF(scales, output)[at]);
        offset[h][half] = float(PA_OF(biases, output)[at]);
      }
    }
  };

  float acc[STRIPS][TILES][4];
  PA_UNROLL for (int m = 0; m < STRIPS; m++) {
    PA_UNROLL for (int n = 0; n < TILES; n++) {
      PA_UNROLL for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    }
  }
  PA_UNROLL for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    asm volatile("cp.async.commit_group;");
  }
  for (int step = 0; step < steps; step++) {
    if (BITS < 16) load_scales(step);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    asm volatile("cp.async.commit_group;");
    const unsigned char* stage = pa_memory + step % STAGES * STAGE;
    PA_UNROLL for (int half = 0; half < 2; half++) {
      // Of output r and r + 8 of each strip: elements (0 1) (2 3) (4 5) (6 7).
      unsigned a[2 * STRIPS][4];
      PA_UNROLL for (int h = 0; h < 2 * STRIPS; h++) {
        const int row = feature + h * 8;
        const unsigned char* line = stage + row * CHUNKS * 16;
        if (BITS == 16) {
          const uint4 v = *(const uint4*)(line + ((half * 4 + c) ^ turn(row)) * 16);
          a[h][0] = v.x, a[h][1] = v.y, a[h][2] = v.z, a[h][3] = v.w;
        } else {
          unsigned words[2];
          if (BITS == 8) {
            const uint2 v = *(const uint2*)(line + ((half * 2 + c / 2) ^ turn(row)) * 16 + c % 2 * 8);
            words[0] = v.x, words[1] = v.y;
          } else {
            words[0] = *(const unsigned*)(line + (half ^ turn(row)) * 16 + c * 4);
          }
          PA_UNROLL for (int e = 0; e < 4; e++) {
            const unsigned pair = BITS == 8 ? words[e / 2] >> e % 2 * 16 : words[0] >> e * 8;
            const float low = float(pair & ((1u << BITS % 16) - 1));
            const float high = float(pair >> BITS % 16 & ((1u << BITS % 16) - 1));
            a[h][e] = pa_pack<T>(low * scale[h][half] + offset[h][half],
                                 high * scale[h][half] + offset[h][half]);
          }
        }
      }
      PA_UNROLL for (int n = 0; n < TILES; n++) {
        const int row = row0 + n * 8 + r;
        const uint4 v = *(const uint4*)(stage + W_BYTES + (row * 8 + ((half * 4 + c) ^ row % 2 * 4)) * 16);
        PA_UNROLL for (int m = 0; m < STRIPS; m++) {
          const unsigned one[4] = {a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1]};
          const unsigned two[4] = {a[2 * m][2], a[2 * m + 1][2], a[2 * m][3], a[2 * m + 1][3]};
          pa_mma<T>(acc[m][n], one, v.x, v.y);
          pa_mma<T>(acc[m][n], two, v.z, v.w);
        }
      }
    }
  }
  if (SWIGLU) {  // pass on the up values that gates are multiplied by
    float* other = (float*)pa_memory;  // [MT, 32]
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    PA_UNROLL for (int x = 0; x < STRIPS * TILES * 4; x++) {
      const int m = x / 4 / TILES, n = x / 4 % TILES, i = x % 4;
      const int row = row0 + n * 8 + c * 2 + i % 2, output = feature + m * 16 + i / 2 * 8;
      if (output >= 32) other[row * 32 + output - 32] = acc[m][n][i];
    }
    __syncthreads();
    PA_UNROLL for (int x = 0; x < STRIPS * TILES * 4; x++) {
      const int m = x / 4 / TILES, n = x / 4 % TILES, i = x % 4;
      const int row = row0 + n * 8 + c * 2 + i % 2, output = feature + m * 16 + i / 2 * 8;
      if (output < 32 && row < rows && exists(output)) {
        float gate = acc[m][n][i], up = other[row * 32 + output];
        if (BIAS) {
          gate += float(bias[first_line + place(output)]);
          up += float(PA_OF(bias, 32)[first_line + place(output + 32)]);
        }
        gate = float(T(gate));
        gate = float(T(gate / (1.0f + PA_EXP2(-1.44269504f * gate))));
        out[(first_row + row) * width + first + output] = O(gate * float(T(up)));
      }
    }
    return;
  }
  PA_UNROLL for (int x = 0; x < STRIPS * TILES * 4; x++) {
    const int m = x / 4 / TILES, n = x / 4 % TILES, i = x % 4;
    const int row = row0 + n * 8 + c * 2 + i % 2, output = first + feature + m * 16 + i / 2 * 8;
    if (row < rows && output < width) {
      float value = acc[m][n][i];
      if (BIAS && part == 0) value += float(bias[first_line + output]);
      out[((size_t)part * rows + first_row + row) * width + output] = O(value);
    }
  }
