  // Matmuls with packed weights [N, K] of 4 or 8 BITS, affine quantised, by warpgroups; CUDA only (Hopper). No
  // weight is written in its full type: a lane converts the codes that it multiplies in registers.
  //   x [K / 64, M, 64] T: rows that `arrange` has put in order   weight [N, K * BITS / 32] uint, low bits first
  //   scales, biases [N, K / GROUP] T
  //   bias [N] T (BIAS)   out [parts, M, N] O: several parts must be added
  //   SWIGLU: the first half of weights are gates, and out [1, M, N / 2] is silu(gate) * other half; of ARRANGED bits,
  //   other than 0, in the order of rows for weights of so many
  // A block computes WIDTH * 64 outputs of MT rows over its part of K, in steps of 64 bytes of each output's codes.
  // Its last four warps bring STAGES steps to shared memory, ahead of the warpgroups that multiply: weights also while
  // the kernel before still runs, if this one is launched early.
  constexpr int MULTIPLYING = WIDTH * 128, OUTPUTS = WIDTH * 64, TILES = MT / 8;
  constexpr int DEPTH = 512 / BITS, X_BYTES = MT * DEPTH * 2, STAGE = X_BYTES + OUTPUTS * 64;
  constexpr int HALF = DEPTH / 32;  // matmuls of 16 inputs that are launched at a time, two times a step
  // Scales and biases are copied for SPAN groups at a time, which are STEPS steps, to one of RING places.
  constexpr int STEPS = SPAN * GROUP / DEPTH, RING = STAGES / STEPS + 2;
  typedef PaAffine<T, BITS> Affine;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  unsigned char* spans = pa_memory + STAGES * STAGE;  // [RING, 2, OUTPUTS, SPAN]: then biases
  PaBarrier* full = (PaBarrier*)(spans + RING * OUTPUTS * 4 * SPAN);
  PaBarrier* empty = full + STAGES;
  const int M = x_shape[1], N = weight_shape[0], K = weight_shape[1] * (32 / BITS);
  const int width = SWIGLU ? N / 2 : N, groups = K / GROUP;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4;
  const int part = blockIdx.z, steps = K / DEPTH / gridDim.z, start = part * steps;
  const int row0 = blockIdx.x * MT, first = blockIdx.y * (SWIGLU ? OUTPUTS / 2 : OUTPUTS);
  // The column of `out` of the block's output i, and the row of weights that it is computed from: with
  // SWIGLU, eight gates and then their up rows, so that a lane has both.
  auto column = [&](int i) { return first + (SWIGLU ? i / 16 * 8 + i % 8 : i); };
  auto line = [&](int i) { return column(i) + (SWIGLU && i % 16 >= 8 ? width : 0); };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      pa_barrier_make(full + s, 129);  // each thread that brings weights arrives, and the one that brings rows
      pa_barrier_make(empty + s, WIDTH * 4);
    }
    pa_barriers_made();
  }
  __syncthreads();
  PA_LET_NEXT_START();

  if (warp >= WIDTH * 4) {
    const int own = threadIdx.x - MULTIPLYING;
    const unsigned line_bytes = K / 8 * BITS;
    const unsigned char* codes = (const unsigned char*)weight + (size_t)line(own / 4) * line_bytes + start * 64 + own % 4 * 16;
    const bool whole = first + (SWIGLU ? OUTPUTS / 2 : OUTPUTS) <= width;
    auto bring_weights = [&](unsigned step, unsigned s) {
      unsigned char* to = pa_memory + s * STAGE + X_BYTES + own * 16;
      PA_UNROLL for (int j = 0; j < OUTPUTS / 32; j++) {
        const unsigned char* from = codes + j * (SWIGLU ? 16 : 32) * line_bytes;
        const bool there = whole || column(j * 32 + own / 4) < width;
        pa_copy16_or_zero(to + j * 2048, there ? from : (const unsigned char*)weight, there);
      }
      codes += 64;
      if (step == 0 || (start + step) % STEPS == 0) {
        const int span = (start + step) / STEPS, place = (span - start / STEPS) % RING;
        PA_UNROLL for (int j = 0; j < WIDTH; j++) {
          const int i = j * 128 + own, output = i % OUTPUTS;
          const bool there = column(output) < width;
          pa_copy_or_zero<SPAN * 2>(spans + (place * OUTPUTS * 2 + i) * (SPAN * 2),
                                    (i / OUTPUTS ? biases : scales)
                                        + (there ? (size_t)line(output) * groups + span * SPAN : 0),
                                    there);
        }
      }
      pa_barrier_arrive_after_copies(full + s);
    };
    const int bytes = (M - row0 < MT ? M - row0 : MT) * 128;
    auto bring_rows = [&](unsigned step, unsigned s) {
      pa_barrier_expect(full + s, bytes * (DEPTH / 64));
      PA_UNROLL for (int panel = 0; panel < DEPTH / 64; panel++) {
        pa_bulk_copy(pa_memory + s * STAGE + panel * (MT * 128),
                     x + ((size_t)((start + step) * (DEPTH / 64) + panel) * M + row0) * 64, bytes, full + s);
      }
    };
    for (int step = 0; step < STAGES && step < steps; step++) bring_weights(step, step);
    if (own == 0) {
      PA_WAIT_FOR_BEFORE();  // only weights are read before, and nothing is written
      for (int step = 0; step < STAGES && step < steps; step++) bring_rows(step, step);
    }
    for (unsigned step = STAGES, s = 0, parity = 0; step < steps; step++) {
      pa_barrier_wait(empty + s, parity);
      if (own == 0) bring_rows(step, s);
      bring_weights(step, s);
      if (++s == STAGES) s = 0, parity ^= 1;
    }
    pa_copies_commit();
    pa_copies_wait<0>();
    return;
  }

  float acc[TILES][4];
  PA_UNROLL for (int i = 0; i < TILES * 4; i++) acc[i / 4][i % 4] = 0.0f;
  unsigned a[2][HALF][4];
  const unsigned long long rows = pa_matrix(pa_memory);
  const unsigned char* codes = pa_memory + X_BYTES + (warp * 16 + r) * 64 + c * 16;
  const unsigned short* by = (const unsigned short*)spans + (warp * 16 + r) * SPAN;
  for (unsigned step = 0, s = 0, parity = 0, place = 0; step < steps; step++) {
    const unsigned at = (start + step) * DEPTH + c * (DEPTH / 4);  // the first input of this lane's
    if (step > 0 && (start + step) % STEPS == 0) place = place == RING - 1 ? 0 : place + 1;
    pa_barrier_wait(full + s, parity);
    uint4 v[2];
    Affine affine[2];
    PA_UNROLL for (int h = 0; h < 2; h++) {
      v[h] = *(const uint4*)(codes + s * STAGE + h * 8 * 64);
      const unsigned short* of = by + place * (OUTPUTS * 2 * SPAN) + h * 8 * SPAN + at / GROUP % SPAN;
      affine[h] = Affine(of[0], of[OUTPUTS * SPAN]);
    }
    const unsigned long long matrix = pa_matrix_after(rows, s * STAGE);
    PA_UNROLL for (int half = 0; half < 2; half++) {
      pa_wgmma_wait<1>();  // for what reads a[half]
      if (half == 1 && step > 0 && lane == 0) pa_barrier_arrive(empty + (s == 0 ? STAGES - 1 : s - 1));
      PA_UNROLL for (int t = 0; t < HALF; t++) {
        PA_UNROLL for (int i = 0; i < 4; i++) {
          const int w = i / 2, from = half * 2 + (BITS == 4 ? t / 2 : t);
          const uint4 u = v[i % 2];
          const unsigned word = from < 2 ? (from ? u.y : u.x) : (from > 2 ? u.w : u.z);
          a[half][t][i] = affine[i % 2].weights(word, BITS == 4 ? t % 2 * 2 + w : w);
        }
      }
      pa_wgmma_fence();
      PA_UNROLL for (int t = 0; t < HALF; t++) {
        const int k = half * HALF + t;
        pa_wgmma<T, TILES>(acc, a[half][t], pa_matrix_after(matrix, k / 4 * (MT * 128) + k % 4 * 32));
      }
      pa_wgmma_commit();
    }
    if (++s == STAGES) s = 0, parity ^= 1;
  }
  pa_wgmma_wait();
  pa_wgmma_sums(acc);

  // Outputs pass through shared memory, from where whole chunks of a row are written, if they are whole.
  constexpr int COLUMNS = SWIGLU ? OUTPUTS / 2 : OUTPUTS, CHUNK = 16 / sizeof(O), PITCH = COLUMNS + CHUNK;
  static_assert(!ARRANGED || MT * PITCH * sizeof(O) <= STAGES * STAGE, "they would not be arranged");
  const bool gathered = MT * PITCH * sizeof(O) <= STAGES * STAGE && width % CHUNK == 0;
  if (gathered) pa_sync_first<MULTIPLYING>();  // all have read their last step
  PA_UNROLL for (int at = 0; at < TILES * 4; at++) {
    const int n = at / 4, i = at % 4;
    if (SWIGLU && i >= 2) continue;
    const int output = warp * 16 + i / 2 * 8 + r, row = n * 8 + c * 2 + i % 2, to = column(output);
    if (row0 + row < M && to < width) {
      float value = acc[n][i] * Affine::WHOLE;
      if (BIAS && part == 0) value += float(bias[to]);
      if (SWIGLU) {
        float up = acc[n][i + 2] * Affine::WHOLE;
        if (BIAS) up += float(bias[to + width]);
        value = float(T(value));
        value = float(T(value / (1.0f + PA_EXP2(-1.44269504f * value)))) * float(T(up));
      }
      if (gathered) {
        ((O*)pa_memory)[row * PITCH + to - first] = O(value);
      } else {
        out[((size_t)part * M + row0 + row) * width + to] = O(value);
      }
    }
  }
  if (gathered) {
    pa_sync_first<MULTIPLYING>();
    for (int i = threadIdx.x; i < MT * COLUMNS / CHUNK; i += MULTIPLYING) {
      const int row = i / (COLUMNS / CHUNK), at = i % (COLUMNS / CHUNK) * CHUNK;
      if (row0 + row >= M || first + at >= width) continue;
      const uint4 v = *(const uint4*)((const O*)pa_memory + row * PITCH + at);
      if constexpr (ARRANGED != 0) {
        pa_put_in_order<ARRANGED>(out, v, first + at, row0 + row, M);
      } else {
        *(uint4*)(out + ((size_t)part * M + row0 + row) * width + first + at) = v;
      }
    }
  }
