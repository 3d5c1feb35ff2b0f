  // Matmuls of rows with the weights of their experts, by warpgroups (wgmma); for many rows of an expert,
  // CUDA only. A block computes 256 outputs of a tile of up to MT rows of one expert, in steps of 64
  // inputs, with STAGES steps in shared memory or on their way there.
  //   x [M, K] T: with GATHER in the original order, otherwise sorted by expert
  //   source, spans: see dispatch.h   weight [EXPERTS, N, K] T   bias [EXPERTS, N] T (BIAS)
  //   out [pairs, N] T, sorted by expert   SWIGLU: silu(x * weight) * (x * weight_up)
  constexpr int OUTPUTS = 256, DEPTH = 64, THREADS = 256, TILES = MT / 8, AHEAD = STAGES - 2;
  constexpr int W_AT = MT * DEPTH * 2, STAGE = W_AT + OUTPUTS * DEPTH * 2;
  constexpr int COLUMNS = SWIGLU ? OUTPUTS / 2 : OUTPUTS, PITCH = COLUMNS + 8;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  const int* const span = spans + blockIdx.y * 3;
  const int rows = span[2], N = weight_shape[1], K = weight_shape[2], steps = K / DEPTH;
  if (rows == 0) return;
  const size_t first_line = (size_t)span[0] * N, first_row = span[1];
  const int lane = threadIdx.x & 31, r = lane / 4, c = lane % 4, group = threadIdx.x >> 7;
  const int first = blockIdx.x * COLUMNS, strip = (threadIdx.x >> 5 & 3) * 16;

  // What a thread copies: 16 bytes of 8 lines of weights and of MT / 32 rows. Each warpgroup has 128
  // lines, which are 64 gates and their 64 up rows with SWIGLU. A line's chunks are exchanged: see pa_matrix.
  const int chunk = threadIdx.x % 8, from = threadIdx.x / 8;
  const int to = from * 128 + (chunk ^ from % 8) * 16;
  const T* lines[OUTPUTS / 32];
  const T* row_of[MT / 32];
  PA_UNROLL for (int j = 0; j < OUTPUTS / 32; j++) {
    const int i = j * 32 + from, line = first + (SWIGLU ? i / 128 * 64 + i % 64 : i);
    lines[j] = (SWIGLU && i / 64 % 2 ? weight_up : weight) + (first_line + (line < N ? line : 0)) * K + chunk * 8;
  }
  PA_UNROLL for (int j = 0; j < MT / 32; j++) {
    const int row = j * 32 + from;
    const size_t at = first_row + (row < rows ? row : 0);
    row_of[j] = x + (GATHER ? (size_t)source[at] : at) * K + chunk * 8;
  }
  auto load = [&](int step) {
    unsigned char* stage = pa_memory + step % STAGES * STAGE;
    PA_UNROLL for (int j = 0; j < OUTPUTS / 32; j++) {
      pa_copy16(stage + W_AT + j * 4096 + to, lines[j] + step * DEPTH);
    }
    PA_UNROLL for (int j = 0; j < MT / 32; j++) {
      if (j * 32 < rows) pa_copy16(stage + j * 4096 + to, row_of[j] + step * DEPTH);
    }
  };

  float acc[2][TILES][4];
  PA_UNROLL for (int i = 0; i < 2 * TILES * 4; i++) acc[i / 4 / TILES][i / 4 % TILES][i % 4] = 0.0f;
  PA_UNROLL for (int step = 0; step < AHEAD; step++) {
    if (step < steps) load(step);
    pa_copies_commit();
  }
  // By matmuls of as few columns as there are rows.
  auto multiply = [&](auto tiles) {
    for (int step = 0; step < steps; step++) {
      pa_copies_wait<AHEAD - 1>();
      pa_async_fence();
      __syncthreads();  // also: the matmuls of the step before the last are done
      if (step + AHEAD < steps) load(step + AHEAD);
      pa_copies_commit();
      const unsigned char* stage = pa_memory + step % STAGES * STAGE;
      pa_wgmma_fence();
      PA_UNROLL for (int t = 0; t < DEPTH / 16; t++) {
        PA_UNROLL for (int half = 0; half < 2; half++) {
          const unsigned char* weights = stage + W_AT + (group * 2 + half) * 8192;
          pa_wgmma_shared<T, decltype(tiles)::VALUE>(
              acc[half], pa_matrix(weights + t * 32), pa_matrix(stage + t * 32));
        }
      }
      pa_wgmma_commit();
      pa_wgmma_wait<1>();
    }
  };
  if (rows <= 32) {
    multiply(PaNumber<4>());
  } else if (rows <= 64) {
    multiply(PaNumber<8>());
  } else {
    multiply(PaNumber<TILES>());
  }
  pa_wgmma_wait<0>();
  pa_copies_wait<0>();
  __syncthreads();

  // Outputs pass through shared memory, from where whole chunks of a row are written.
  T* const given = (T*)pa_memory;
  PA_UNROLL for (int x = 0; x < (SWIGLU ? 1 : 2) * TILES * 4; x++) {
    const int half = x / 4 / TILES, n = x / 4 % TILES, i = x % 4;
    const int column = (SWIGLU ? group * 64 : group * 128 + half * 64) + strip + i / 2 * 8 + r;
    const int row = n * 8 + c * 2 + i % 2;
    const int line = first + column;
    float value = acc[half][n][i];
    if (BIAS && line < N) value += float(bias[first_line + line]);
    if (SWIGLU) {
      float up = acc[1][n][i];
      if (BIAS && line < N) up += float(bias_up[first_line + line]);
      value = float(T(value));
      value = float(T(value / (1.0f + PA_EXP2(-1.44269504f * value)))) * float(T(up));
    }
    if (row < rows) given[row * PITCH + column] = T(value);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * (COLUMNS / 8); i += THREADS) {
    const int row = i / (COLUMNS / 8), at = i % (COLUMNS / 8) * 8;
    if (first + at < N) {
      *(uint4*)(out + (first_row + row) * N + first + at) = *(const uint4*)(given + row * PITCH + at);
    }
  }
